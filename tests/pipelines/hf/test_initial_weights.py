"""A run begins with the weights of a Hugging Face GPT-2; what is none is refused by name."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from pipelines.config import GPTRunConfig, RunConfig
from pipelines.data.batches import ValidationBatches, open_token_data
from pipelines.errors import AsgoError, UsageError
from pipelines.exchange.export import export_model
from pipelines.hf.initial_model import resolve_with_initial_model
from pipelines.resolve import Layer, preset_layer
from pipelines.training.run_folder import RunFolder, checkpoint_folders
from pipelines.training.train import train
from tests.conftest import SMALL, SilentReporter
from tests.long import long
from tests.pipelines.training.double_precision import double_precision
from tests.pipelines.training.processes import Job, carry_out

Begin = Callable[..., RunConfig]

SHAPE = {"n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 2}
OWN_SHAPE = [key for key in SMALL if key.startswith("model.")]
STILL = {"optimizer__name": "adam", "optimizer__lr": 0.0, "optimizer__weight_decay": 0.0}
"""A run that changes nothing."""


@pytest.fixture
def symbols(token_folder: Path) -> int:
    """The size of the data's vocabulary."""
    return open_token_data(token_folder).vocab_size


@pytest.fixture
def save(tmp_path: Path, symbols: int) -> Callable[..., Path]:
    """Save a GPT-2 of transformers, all of whose weights are random, and return its folder."""

    def make(name: str = "gpt2", **changes: Any) -> Path:
        torch.manual_seed(1)
        model = GPT2LMHeadModel(GPT2Config(**{**SHAPE, "vocab_size": symbols, "bos_token_id": 0, **changes}))
        with torch.no_grad():
            for param in model.parameters():
                param.add_(torch.randn_like(param) * 0.3)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def begin(token_folder: Path) -> Begin:
    """The configuration of a small run that begins with a folder, as the command line makes it."""

    def make(folder: Path, **changes: Any) -> RunConfig:
        small = {key: value for key, value in SMALL.items() if key not in OWN_SHAPE}
        values = {key.replace("__", "."): value for key, value in changes.items()}
        asked = {**small, "data.folder": str(token_folder), "init_from": str(folder), **values}
        return resolve_with_initial_model([preset_layer("gpt", "tiny"), Layer("test", asked)])

    return make


FORWARD = 1e-11
"""How far, as a share, rounding moves a loss in float64: a few dozen operations in a row, each a sum of at most a
thousand terms that is rounded by 1e-16 a term."""


def first_loss(run: Path) -> float:
    """The validation loss before the first step."""
    row = next(row for row in RunFolder(run).rows() if row["split"] == "val")
    assert row["step"] == 0
    return row["loss"]


def loss_of(model: GPT2LMHeadModel, config: RunConfig) -> float:
    """The loss that transformers computes on the run's validation windows."""
    assert isinstance(config, GPTRunConfig)
    data = open_token_data(Path(config.data.folder))
    windows = ValidationBatches(data, config.model.context_length, config.validation_samples)
    inputs, targets = windows.read(range(len(windows)))
    with torch.no_grad():
        logits = model.eval()(inputs).logits.double()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint_folders(run / "checkpoints")[-1] / "model.safetensors")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {}),
        ({"activation_function": "gelu", "tie_word_embeddings": False, "n_inner": 40}, {}),
        ({"n_positions": 32}, {"model__context_length": 16, "training__ema_decay": 0.9}),
        ({"vocab_size": 30}, {}),
    ],
    ids=["as published", "exact GELU, own head, width within", "a part of the context, averaged", "padded"],
)
def test_the_first_loss_is_that_of_transformers(
    theirs: dict[str, Any], ours: dict[str, Any], save: Callable[..., Path], begin: Begin,
    tmp_path: Path, reporter: SilentReporter,
) -> None:  # fmt: skip
    folder = save(**theirs)
    config = begin(folder, **ours)
    with double_precision():
        train(config, tmp_path / "run", reporter)
    expected = loss_of(AutoModelForCausalLM.from_pretrained(folder).double(), config)
    assert first_loss(tmp_path / "run") == pytest.approx(expected, rel=FORWARD)
    assert abs(RunFolder(tmp_path / "run").rows()[-1]["loss"] - expected) > 1e-3, "it trains"


def test_there_and_back_again_every_bit_is_the_same(
    save: Callable[..., Path], begin: Begin, tmp_path: Path, reporter: SilentReporter
) -> None:
    for name, tied, activation in (("tied", True, "gelu_new"), ("untied", False, "gelu")):
        folder = save(name, tie_word_embeddings=tied, activation_function=activation)
        train(begin(folder, **STILL), tmp_path / f"run-{name}", reporter)
        export_model(tmp_path / f"run-{name}", "hf", tmp_path / f"out-{name}")
        out = tmp_path / f"out-{name}"
        assert json.loads((out / "config.json").read_text())["activation_function"] == activation
        before, after = (load_file(each / "model.safetensors") for each in (folder, out))
        assert before.keys() == after.keys()
        for key, tensor in before.items():
            assert torch.equal(after[key], tensor), key


def test_a_run_of_ours_goes_on_after_its_export(
    small_config: Begin, begin: Begin, tmp_path: Path, reporter: SilentReporter
) -> None:
    """Also without biases, which GPT-2 always has: zeros there."""
    train(small_config(model__bias=False), tmp_path / "first", reporter)
    export_model(tmp_path / "first", "hf", tmp_path / "out")
    train(begin(tmp_path / "out", model__bias=False, **STILL), tmp_path / "second", reporter)
    first, second = final_weights(tmp_path / "first"), final_weights(tmp_path / "second")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_model_in_several_files_or_half_precision_or_with_masks_is_the_same(
    save: Callable[..., Path], begin: Begin, tmp_path: Path, reporter: SilentReporter
) -> None:
    """Masks lie in the published files of GPT-2, and names without the prefix."""
    folder = save()
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    weights = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 16, 16).tril() for layer in range(2)}
    save_file({**weights, **masks}, folder / "model.safetensors")
    shutil.copytree(folder, tmp_path / "parts")
    (tmp_path / "parts/model.safetensors").unlink()
    names = sorted(weights)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, its in parts.items():
        save_file({name: weights[name] for name in its}, tmp_path / "parts" / file)
    index = {"weight_map": {name: file for file, its in parts.items() for name in its}}
    (tmp_path / "parts/model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    for name in ("gpt2", "parts"):
        train(begin(tmp_path / name, **STILL), tmp_path / f"run-{name}", reporter)
        assert torch.equal(
            final_weights(tmp_path / f"run-{name}")["token_embedding.weight"], weights["wte.weight"].float()
        )
    assert first_loss(tmp_path / "run-gpt2") == first_loss(tmp_path / "run-parts")


def test_a_run_resumes_exactly_without_the_folder(
    save: Callable[..., Path], begin: Begin, tmp_path: Path, reporter: SilentReporter
) -> None:
    folder = save()
    config = begin(folder, checkpoint__keep=3)
    train(config, tmp_path / "run", reporter)
    assert RunFolder(tmp_path / "run").config() == config
    expected = final_weights(tmp_path / "run")
    for later in checkpoint_folders(tmp_path / "run/checkpoints")[1:]:
        shutil.rmtree(later)
    shutil.rmtree(folder)
    train(config, tmp_path / "run", reporter, resume=True)
    resumed = final_weights(tmp_path / "run")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())


def test_a_run_does_not_begin_with_weights_that_were_changed_since(
    save: Callable[..., Path], begin: Begin, tmp_path: Path, reporter: SilentReporter
) -> None:
    folder = save()
    config = begin(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.ln_f.bias"][0] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UsageError, match="its weights are not those that initial_weights_sha256 names"):
        train(config, tmp_path / "run", reporter)


@long
def test_two_processes_begin_with_it_each_with_a_share_of_every_weight(
    save: Callable[..., Path], begin: Begin, tmp_path: Path, reporter: SilentReporter
) -> None:
    folder = save()
    brief = {"training__steps": 1, "training__micro_batch_size": 2, "evaluation__batches": 4}
    with double_precision():
        train(begin(folder, **brief), tmp_path / "one", reporter)
    shared = begin(folder, runtime__shard_model=True, **brief)
    carry_out([Job(shared, tmp_path / "two", double=True)], 2, tmp_path)
    assert first_loss(tmp_path / "one") == pytest.approx(first_loss(tmp_path / "two"), rel=FORWARD)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "model_type is 'bert'; supported: gpt2, llama"),
        ({"activation_function": "relu"}, "activation_function is 'relu'; supported: gelu, gelu_new"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False; only True is supported"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
        ({"n_layer": "two"}, "n_layer is 'two'; it must be a positive whole number"),
        ({"n_inner": 0}, "n_inner is 0; it must be a positive whole number or null"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'; it must be true or false"),
    ],
)
def test_what_is_no_gpt2_is_refused_by_name(
    changes: dict[str, Any], message: str, save: Callable[..., Path], begin: Begin
) -> None:
    folder = save()
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}), encoding="utf-8")
    with pytest.raises(UsageError) as error:
        begin(folder)
    assert str(error.value).startswith(f"{path}: {message}")


def test_settings_that_contradict_it_are_refused_a_line_each(save: Callable[..., Path], begin: Begin) -> None:
    folder = save()
    with pytest.raises(UsageError) as error:
        begin(folder, model__n_layers=3, model__tied_head=False, model__context_length=17)
    assert str(error.value).splitlines() == [
        f"model.n_layers is 3, but 2 in {folder}: leave it out",
        f"model.tied_head is False, but True in {folder}: leave it out",
        f"model.context_length is 17, but {folder} allows 16",
    ]


def test_biases_are_not_dropped_in_silence(
    save: Callable[..., Path], begin: Begin, tmp_path: Path, reporter: SilentReporter
) -> None:
    with pytest.raises(UsageError, match="has biases that are not zero"):
        train(begin(save(), model__bias=False), tmp_path / "run", reporter)


@pytest.mark.parametrize("difference", [-1, 16, 256])
def test_a_model_of_another_vocabulary_is_refused(
    difference: int, symbols: int, save: Callable[..., Path], begin: Begin, tmp_path: Path, reporter: SilentReporter
) -> None:
    """The data has 15 characters: more than as many unused symbols are no padding."""
    assert symbols == 15
    config = begin(save(vocab_size=symbols + difference))
    words = (
        rf"the model has {symbols + difference} symbols, but {config.data.folder} has {symbols} \(chars\); use --data"
    )
    with pytest.raises(UsageError, match=words):
        train(config, tmp_path / "run", reporter)


@pytest.mark.parametrize(("more", "said"), [(0, []), (15, ["15 of the model's 30 symbols are unused, since"])])
def test_symbols_that_the_data_does_not_have_are_told_once(
    more: int, said: list[str], symbols: int, save: Callable[..., Path], begin: Begin, tmp_path: Path,
    reporter: SilentReporter,
) -> None:  # fmt: skip
    config = begin(save(vocab_size=symbols + more))
    for resume in (False, True):
        train(config, tmp_path / "run", reporter, resume=resume)
    told = [line for line in reporter.notes if "unused" in line]
    assert told == [
        f"{config.init_from}: {words} {config.data.folder} has 15 (chars); the data must be made with the model's "
        "tokenizer"
        for words in said
    ]


def test_damaged_folders_are_refused_in_one_line(
    save: Callable[..., Path], begin: Begin, tmp_path: Path, reporter: SilentReporter
) -> None:
    with pytest.raises(UsageError, match="nowhere: no such folder"):
        begin(tmp_path / "nowhere")
    folder = save()
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    tensors = load_file(weights)
    for without, message in (("transformer.h.1.attn.c_attn.bias", "have no 'h.1.attn.c_attn.bias'"), (None, "'extra'")):
        kept = {name: tensor for name, tensor in tensors.items() if name != without}
        save_file(kept if without else {**kept, "extra": torch.zeros(1)}, weights)
        with pytest.raises(AsgoError, match=message):
            train(begin(folder), tmp_path / "run", reporter)
    weights.write_bytes(whole[:-1])
    with pytest.raises(AsgoError, match=r"model\.safetensors: damaged"):
        train(begin(folder), tmp_path / "run", reporter)
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"pytorch_model\.bin: a pickle, .* never opened here"):
        begin(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(UsageError, match=r"has no model\.safetensors"):
        begin(folder)
    (folder / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UsageError, match=r"config\.json: damaged"):
        begin(folder)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_named_with_their_file_before_training(
    value: float, save: Callable[..., Path], begin: Begin, tmp_path: Path, reporter: SilentReporter
) -> None:
    """A mask, which is not a weight, may be infinite."""
    folder = save()
    path = folder / "model.safetensors"
    tensors = load_file(path) | {"transformer.h.0.attn.masked_bias": torch.tensor(-math.inf)}
    save_file(tensors, path)
    train(begin(folder, **STILL), tmp_path / "well", reporter)
    name = "transformer.h.1.mlp.c_fc.weight"
    tensors[name][3, 5] = value
    save_file(tensors, path)
    words = (
        r"model\.safetensors: transformer\.h\.1\.mlp\.c_fc\.weight: 1 of 2,304 weights are NaN or infinite in float32$"
    )
    with pytest.raises(AsgoError, match=words):
        train(begin(folder), tmp_path / "run", reporter)
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_run_of_asgo_is_refused_with_the_commands_that_go_on_there(
    small_config: Begin, begin: Begin, tmp_path: Path, reporter: SilentReporter
) -> None:
    run = tmp_path / "run"
    train(small_config(), run, reporter)
    checkpoint = checkpoint_folders(run / "checkpoints")[-1]
    for folder, what in ((run, f"a run of asgo: begin there with --branch {run},"),
                         (checkpoint, f"a checkpoint of asgo: begin there with --branch {run}@STEP,")):  # fmt: skip
        with pytest.raises(UsageError) as error:
            begin(folder)
        assert str(error.value) == (
            f"{folder}: {what} or give --init-from the folder that this writes: "
            f"asgo export-model {folder} --format hf --out FOLDER"
        )


@pytest.mark.parametrize("claim", [{"n_layer": 10**9}, {"vocab_size": 10**12}, {"n_positions": 10**30}, {"n_layer": 1}])
def test_sizes_that_the_weights_do_not_have_are_refused_before_anything_is_built(
    begin: Begin, save: Callable[..., Path], claim: dict[str, int]
) -> None:
    folder = save()
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **claim}))
    with pytest.raises(UsageError, match=r"config\.json: "):
        begin(folder)
