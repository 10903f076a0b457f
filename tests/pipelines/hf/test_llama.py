"""Llamas of transformers begin runs, and runs become Llamas of transformers; what is none is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pipelines.config import GPTRunConfig, RunConfig, RuntimeSettings
from pipelines.data.batches import open_token_data
from pipelines.errors import UsageError
from pipelines.exchange.export import export_model
from pipelines.generation import generate
from pipelines.hf.initial_model import resolve_with_initial_model
from pipelines.hf.initial_weights import load_initial_weights
from pipelines.resolve import Layer, preset_layer, resolve
from pipelines.training.checkpoint import open_checkpoint
from pipelines.training.gpt_task import build_decoder
from pipelines.training.run_folder import RunFolder, checkpoint_folders
from pipelines.training.train import train
from tests.conftest import SMALL, SilentReporter
from tests.long import long
from tests.pipelines.training.processes import Job, carry_out

Save = Callable[..., Path]
Make = Callable[..., RunConfig]

SHAPE = {
    "max_position_embeddings": 16, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
BRIEF = {key: value for key, value in SMALL.items() if not key.startswith("model.")}
STILL = {"optimizer__name": "adam", "optimizer__lr": 0.0, "optimizer__weight_decay": 0.0}
"""A run that changes nothing."""


@pytest.fixture
def symbols(token_folder: Path) -> int:
    """The size of the data's vocabulary."""
    return open_token_data(token_folder).vocab_size


@pytest.fixture
def save(tmp_path: Path, symbols: int) -> Save:
    """Save a Llama of transformers, all of whose weights are random, and return its folder."""

    def make(name: str = "llama", shard: str = "1GB", **changes: Any) -> Path:
        torch.manual_seed(1)
        model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "vocab_size": symbols, **changes}))
        with torch.no_grad():
            for param in model.parameters():
                param.add_(torch.randn_like(param) * 0.3)
        model.save_pretrained(tmp_path / name, max_shard_size=shard)
        return tmp_path / name

    return make


@pytest.fixture
def begin(token_folder: Path) -> Make:
    """The configuration of a small run that begins with a folder, as the command line makes it."""

    def make(folder: Path, preset: str = "tiny", **changes: Any) -> RunConfig:
        values = {key.replace("__", "."): value for key, value in changes.items()}
        asked = {**BRIEF, "data.folder": str(token_folder), "init_from": str(folder), **values}
        return resolve_with_initial_model([preset_layer("gpt", preset), Layer("test", asked)])

    return make


@pytest.fixture
def small_llama(token_folder: Path) -> Make:
    """The preset `llama-tiny`, made small."""

    def make(**changes: Any) -> RunConfig:
        values = {key.replace("__", "."): value for key, value in changes.items()}
        small = {**SMALL, "model.n_heads": 4, "data.folder": str(token_folder), **values}
        return resolve([preset_layer("gpt", "llama-tiny"), Layer("test", small)])

    return make


def edit(folder: Path, **changes: Any) -> Path:
    """Change a configuration; None removes a key. Returns its path."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return path


def begun(config: RunConfig, symbols: int) -> nn.Module:
    """The model with which a run begins."""
    assert isinstance(config, GPTRunConfig)
    model = build_decoder(config.model, symbols).eval()
    load_initial_weights(model, config)
    return model


def final_weights(run: Path) -> dict[str, Tensor]:
    return load_file(checkpoint_folders(run / "checkpoints")[-1] / "model.safetensors")


@torch.no_grad()
def assert_same_logits(ours: nn.Module, folder: Path, symbols: int, tolerance: float) -> None:
    theirs, notes = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert isinstance(theirs, LlamaForCausalLM)
    assert not any(notes.values()), notes
    tokens = torch.randint(symbols, (4, 16), generator=torch.Generator().manual_seed(0))
    expected = theirs.eval()(tokens).logits
    assert expected.std() > 0.3, "else the comparison would say little"
    torch.testing.assert_close(ours(tokens)[..., :symbols], expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("preset", ["tiny", "track3-small"])
@pytest.mark.parametrize(
    "theirs",
    [
        {},
        {"tie_word_embeddings": True, "num_key_value_heads": 1, "shard": "20KB"},
        {"rms_norm_eps": 0.1, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
    ],
    ids=["plain", "tied, in several files", "other numbers"],
)
def test_a_run_begins_with_the_model_of_transformers(
    theirs: dict[str, Any], preset: str, save: Save, begin: Make, symbols: int
) -> None:
    """Whatever model the preset has."""
    folder = save(**theirs)
    assert (folder / "model.safetensors").exists() != ("shard" in theirs)
    lengths = {"evaluation__tokens": 64, "evaluation__batches": None} if preset != "tiny" else {}
    config = begin(folder, preset, **lengths)
    assert isinstance(config, GPTRunConfig)
    assert config.model.kind == "transformer"
    assert_same_logits(begun(config, symbols), folder, symbols, 1e-5)


def test_older_files_are_the_same_model(save: Save, begin: Make, symbols: int) -> None:
    """The keys of transformers 4, buffers of frequencies, and names without prefix."""
    folder = save(rope_parameters={"rope_type": "default", "rope_theta": 7.0})
    expected = begun(begin(folder), symbols).state_dict()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file({name.removeprefix("model."): it for name, it in tensors.items()}, folder / "model.safetensors")
    edit(folder, rope_parameters=None, rope_theta=7.0, rope_scaling={"type": "default"}, head_dim=None)
    config = begin(folder)
    assert isinstance(config, GPTRunConfig)
    assert config.model.model_dump()["rotary_base"] == 7.0
    found = begun(config, symbols).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@long
def test_two_processes_begin_with_it_each_with_a_share_of_every_weight(
    save: Save, begin: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    """Also with a bfloat16 embedding, which FSDP2 shards apart. Only the sum of the losses is rounded otherwise."""
    models: dict[str, tuple[Path, dict[str, Any]]] = {
        "tied": (save("tied", tie_word_embeddings=True), {}),
        "own head, in several files": (save("own", shard="20KB"), {"model__embedding_dtype": "bfloat16"}),
    }
    brief = {"training__steps": 1, "training__micro_batch_size": 2, "evaluation__batches": 4}
    jobs = []
    for name, (folder, changes) in models.items():
        train(begin(folder, **brief, **changes), tmp_path / "one" / name, reporter)
        shares = begin(folder, **brief, **changes, runtime__shard_model=True)
        jobs.append(Job(shares, tmp_path / "two" / name))
    carry_out(jobs, 2, tmp_path)
    for name in models:
        one, two = (RunFolder(tmp_path / run / name).rows()[0] for run in ("one", "two"))
        assert one["step"] == 0
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-12)


VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {},
    "own head, padded": {
        "model__tied_head": False, "model__vocab_multiple": 64, "model__embedding_dtype": "bfloat16",
        "model__rotary_base": 50.0, "model__norm_eps": 0.01,
    },
    "a key for each query": {"model__n_kv_heads": 4, "training__ema_decay": 0.5},
    "the usual scale": {"model__d_model": 32, "model__attention_scale": 0.3535534},
}  # fmt: skip


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_an_exported_run_has_our_logits_and_begins_another_bit_for_bit(
    changes: dict[str, Any], small_llama: Make, begin: Make, tmp_path: Path, reporter: SilentReporter, symbols: int
) -> None:
    train(small_llama(optimizer__name="adam", optimizer__lr=0.05, **changes), tmp_path / "run", reporter)
    export_model(tmp_path / "run", "hf", tmp_path / "out")
    checkpoint = open_checkpoint(checkpoint_folders(tmp_path / "run/checkpoints")[-1])
    config = checkpoint.config()
    assert isinstance(config, GPTRunConfig)
    ours = build_decoder(config.model, symbols).eval()
    ours.load_state_dict(checkpoint.model_tensors(), strict=False)
    assert_same_logits(ours, tmp_path / "out", symbols, 1e-4)

    train(begin(tmp_path / "out", **STILL), tmp_path / "second", reporter)
    again = final_weights(tmp_path / "second")
    assert again.keys() == checkpoint.model_tensors().keys()
    for name, tensor in checkpoint.model_tensors().items():
        assert torch.equal(again[name], tensor[: len(again[name])].float()), name


def test_it_writes_what_asgo_generate_writes(small_llama: Make, tmp_path: Path, reporter: SilentReporter) -> None:
    until = {"training__steps": 100, "evaluation__every": 100, "checkpoint__every": 100}
    train(small_llama(optimizer__name="adam", optimizer__lr=0.01, **until), tmp_path / "run", reporter)
    export_model(tmp_path / "run", "hf", tmp_path / "out")
    expected = generate(
        tmp_path / "run", "the cat", new_tokens=8, temperature=0, top_k=None, seed=0,
        runtime=RuntimeSettings(device="cpu"),
    )  # fmt: skip
    model = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer(tokenizer.bos_token + "the cat", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    assert tokenizer.decode(written[0, 1:]) == expected
    assert len(set(expected.removeprefix("the cat"))) > 1, "else it would say little"


def test_a_model_with_other_parts_is_not_exported(small_llama: Make, tmp_path: Path, reporter: SilentReporter) -> None:
    parts = {"model__softcap": 15.0, "model__qk_norm": True, "model__mlp": "relu2", "model__rotary_fraction": 0.5}
    parts |= {"model__attention_scale": 0.501}
    train(small_llama(training__steps=1, **parts), tmp_path / "run", reporter)
    with pytest.raises(UsageError) as error:
        export_model(tmp_path / "run", "hf", tmp_path / "out")
    assert str(error.value) == (
        f"{tmp_path}/run/checkpoints/step-00000001: --format hf writes a Llama, which cannot have "
        "model.rotary_fraction=0.5, model.qk_norm=True, model.attention_scale=0.501, model.mlp=relu2, "
        "model.softcap=15.0"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'; supported: gpt2, llama"),
        ({"model_type": ["llama"]}, "model_type is ['llama']; supported: gpt2, llama"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is supported"),
        ({"attention_bias": True}, "attention_bias is True; only False is supported"),
        ({"mlp_bias": True}, "mlp_bias is True; only False is supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; only 1.0 is supported"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers is 'two'; it must be a positive whole number"),
        ({"hidden_size": 32.0}, "hidden_size is 32.0; it must be a positive whole number"),
        ({"vocab_size": None}, "vocab_size is missing; it must be a positive whole number"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'; it must be true or false"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; it must be true or false"),
        ({"rope_theta": [7.0], "rope_parameters": None}, "rope_theta is [7.0]; it must be a number"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads is '2'; it must divide num_attention_heads, 4"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; it must divide num_attention_heads, 4"),
        ({"head_dim": 16}, "head_dim is 16; only hidden_size / num_attention_heads, 32 / 4, is supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "the rotary positions are {'rope_type': 'llama3'"),
        ({"rope_parameters": {"type": "linear"}}, "the rotary positions are {'type': 'linear'}; only the default"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 7.0}}}, "the rotary positions are {'full_attention'"),
        ({"rope_parameters": "default"}, "the rotary positions are 'default'; only the default"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'; it must be a number"),
        ({"num_hidden_layers": 10**9}, "layers.999999999.self_attn.k_proj.weight should be 16 x 32, but"),
        ({"num_hidden_layers": 1}, "of another model: the weights also have 'layers.1.input_layernorm.weight'"),
        ({"vocab_size": 10**12}, "embed_tokens.weight should be 1000000000000 x 32, but the weights have one of"),
        ({"num_key_value_heads": 4}, "layers.1.self_attn.k_proj.weight should be 32 x 32, but the weights have one of"),
    ],
    ids=str,
)
def test_what_is_no_llama_of_ours_is_refused_by_name(
    changes: dict[str, Any], message: str, save: Save, begin: Make
) -> None:
    path = edit(save(), **changes)
    with pytest.raises(UsageError) as error:
        begin(path.parent)
    assert str(error.value).startswith(f"{path}: {message}")
    assert "\n" not in str(error.value)


def test_positions_beyond_any_limit_are_refused(save: Save, begin: Make) -> None:
    """They have no weights to compare with."""
    folder = save()
    edit(folder, max_position_embeddings=10**30)
    with pytest.raises(UsageError, match=r"model\.context_length = 10{30}: should be less than or equal to 1048576$"):
        begin(folder)


def test_settings_that_contradict_it_are_refused_a_line_each(save: Save, begin: Make) -> None:
    folder = save()
    for changes, lines in (
        ({"model__kind": "gpt", "model__d_ff": 8}, [f"model.kind is gpt, but transformer in {folder}: leave it out"]),
        (
            {"model__softcap": 15.0, "model__bias": True, "model__context_length": 17},
            [
                f"model.bias is True, but False in {folder}: leave it out",
                f"model.softcap is 15.0, but 0.0 in {folder}: leave it out",
                f"model.context_length is 17, but {folder} allows 16",
            ],
        ),
    ):
        with pytest.raises(UsageError) as error:
            begin(folder, **changes)
        assert str(error.value).splitlines() == lines
    config = begin(folder, "asgo-nanogpt", model__context_length=8, training__micro_batch_size=4)
    assert isinstance(config, GPTRunConfig)
    assert (config.model.context_length, config.model.model_dump()["dropout"]) == (8, 0.2), "the run's own"


def test_other_weights_than_those_of_the_configuration_are_refused_by_name(save: Save, begin: Make) -> None:
    """Before anything is built; also if a name claims a billion layers, which no loop may count."""
    folder = save()
    tensors = load_file(folder / "model.safetensors")
    bias = "layers.0.self_attn.q_proj.bias"
    for changed, message in (
        ({name: it for name, it in tensors.items() if name != "model.norm.weight"}, "have no 'norm.weight'"),
        ({**tensors, f"model.{bias}": torch.zeros(32)}, f"also have '{bias}'"),
    ):
        save_file(changed, folder / "model.safetensors")
        with pytest.raises(UsageError, match=rf"config\.json: of another model: the weights {message}"):
            begin(folder)
    last = {name.replace("layers.1.", "layers.999999999."): it for name, it in tensors.items()}
    save_file(last, folder / "model.safetensors")
    edit(folder, num_hidden_layers=10**9)
    with pytest.raises(UsageError, match=r"have no 'layers\.1\."):
        begin(folder)
