"""The decoder of parts in whole runs: settings, presets, training, resume, shards, text."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from asgo_cli.app import app
from models.gpt import next_token_loss
from optim import OPTIMIZER_NAMES
from pipelines.config import RunConfig, RuntimeSettings, load_run_config
from pipelines.errors import UsageError
from pipelines.generation import generate
from pipelines.resolve import Layer, preset_layer, resolve
from pipelines.training.gpt_task import GPTTask, build_decoder
from pipelines.training.run_folder import RunFolder
from pipelines.training.schedule import factor_at
from pipelines.training.train import new_optimizer, train
from tests.conftest import SMALL, SilentReporter
from tests.long import long
from tests.pipelines.training.processes import Job, carry_out
from tests.pipelines.training.test_resume import Dies, assert_same_run, die_at

PRESETS = ("llama-130m", "track3", "track3-small", "llama-tiny")
SMALL_HEADS = {"model.n_heads": 4, "model.n_kv_heads": 2}

Make = Callable[..., RunConfig]


@pytest.fixture
def make(token_folder: Path) -> Make:
    """A run of a preset, made small; keywords are dotted keys with `__` for the dot."""

    def configured(preset: str, **changes: Any) -> RunConfig:
        values = {key.replace("__", "."): value for key, value in changes.items()}
        small = {**SMALL, **SMALL_HEADS, "data.folder": str(token_folder)}
        return resolve([preset_layer("gpt", preset), Layer("test", {**small, **values})])

    return configured


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_has_settings_for_every_optimizer(preset: str) -> None:
    for name in OPTIMIZER_NAMES:
        config = resolve([preset_layer("gpt", preset), Layer("test", {"optimizer.name": name})])
        with torch.device("meta"):
            new_optimizer(build_decoder(config.model, 65), config)


def test_track_3_has_its_muon_its_adamw_and_its_schedule() -> None:
    config = resolve([preset_layer("gpt", "track3")])
    with torch.device("meta"):
        model = build_decoder(config.model, 50_257)
    assert sum(param.numel() for param in model.parameters()) == 2 * 50_304 * 768 + 50_304 + 26 * 768 + 12 * (
        12 * 768**2 + 4 * 768 + 3072 + 768
    )
    groups = {group.get("part", "matrices"): group for group in new_optimizer(model, config).param_groups}
    assert {part: group["lr"] for part, group in groups.items()} == {
        "embedding": 0.7, "head": 0.004, "vectors": 0.015, "matrices": 0.025
    }  # fmt: skip
    for part in ("embedding", "head", "vectors"):
        assert groups[part]["betas"] == (0.8, 0.95)
        assert groups[part]["weight_decay"] == 0.001
        assert groups[part]["eps"] * 524_288 == 1e-10
    assert groups["matrices"]["ns_coefficients"] == (2.0, -1.5, 0.5)
    counts = {part: len(group["params"]) for part, group in groups.items()}
    assert counts == {"embedding": 1, "head": 1, "vectors": 3 + 12 * 8, "matrices": 12 * 6}
    for step in range(3250):
        eta = min(1.0, (1 - step / 3250) / 0.7)
        assert factor_at(config.schedule, step, 3250) == pytest.approx(eta, rel=1e-12), step


@pytest.mark.parametrize("preset", ["llama-tiny", "track3-small"])
def test_a_run_resumes_bit_for_bit_and_writes_text(
    preset: str, make: Make, tmp_path: Path, reporter: SilentReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a moving average, which is in the dtype of each weight."""
    config = make(preset, training__ema_decay=0.9)
    rows = train(config, tmp_path / "whole", reporter)
    assert rows[-1]["loss"] < rows[0]["loss"]
    with monkeypatch.context() as patched:
        die_at(patched, 4)
        with pytest.raises(Dies):
            train(config, tmp_path / "killed", reporter)
    train(config, tmp_path / "killed", reporter, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    options: dict[str, Any] = {"temperature": 1.0, "top_k": None, "runtime": RuntimeSettings(device="cpu")}
    text = generate(tmp_path / "whole", "the ", new_tokens=30, seed=1, **options)  # the context is 16
    assert len(text.replace("<|endoftext|>", ".")) == len("the ") + 30


@long
def test_two_processes_train_it_in_shards_as_one_does(make: Make, tmp_path: Path, reporter: SilentReporter) -> None:
    """FSDP2 shards the bfloat16 embedding apart from the float32 weights. Rounding differs: losses to three digits."""
    config = make("track3-small", optimizer__name="adamw")
    shares = make("track3-small", optimizer__name="adamw", runtime__shard_model=True)
    train(config, tmp_path / "1", reporter)
    carry_out([Job(shares, tmp_path / "2")], 2, tmp_path / "jobs")
    one, two = ([row["loss"] for row in RunFolder(tmp_path / run).rows()] for run in ("1", "2"))
    assert two == pytest.approx(one, rel=1e-3)


def test_z_loss_is_in_the_training_loss_and_not_in_the_validation_loss(make: Make) -> None:
    tasks = []
    for z_loss in (0.0, 0.1):
        torch.manual_seed(0)
        tasks.append(GPTTask(make("llama-tiny", model__z_loss=z_loss), torch.device("cpu")))
    plain, with_z = tasks
    batch = next(plain.micro_batches(0))
    logits, targets = plain.model(batch[0]), batch[1]
    torch.testing.assert_close(plain.loss(batch), next_token_loss(logits, targets))
    torch.testing.assert_close(with_z.loss(batch), next_token_loss(logits, targets, 0.1))
    assert with_z.loss(batch) > plain.loss(batch) + 0.1
    assert plain.evaluate(lambda: False) == with_z.evaluate(lambda: False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.n_heads": 3}, "model: n_heads=3 does not divide d_model=16; 2 or 4 would do"),
        (
            {"model.n_heads": 32, "model.positions": "learned"},
            "model: n_heads=32 does not divide d_model=16; 16 would do",
        ),
        ({"model.n_kv_heads": 3}, "model: n_kv_heads=3 does not divide n_heads=4; 2 or 4 would do"),
        (
            {"model.n_heads": 16},
            "model: positions=rotary needs an even head size, not d_model / n_heads = 16 / 16 = 1; n_heads=8 would do",
        ),
        ({"model.d_model": 15}, "model: positions=rotary needs an even d_model, not 15"),
        (
            {"model.rotary_fraction": 0.3},
            "model: rotary_fraction=0.3 must be a multiple of 1/2, since a head has 2 pairs",
        ),
        (
            {"model.rotary_fraction": 0.1},
            "model: rotary_fraction=0.1 must be a multiple of 1/2, since a head has 2 pairs",
        ),
        ({"model.mlp": "swigul"}, "model.mlp = 'swigul': should be 'swiglu', 'geglu', 'gelu' or 'relu2'; did you mean"),
        ({"model.norm": "batch"}, "model.norm = 'batch': should be 'rms' or 'layer'"),
        ({"model.gelu": "tanh"}, "model.gelu: unknown key"),
        ({"model.init": "track3"}, "model: init=track3 needs a head of its own; set tied_head=false"),
        ({"model.embedding_dtype": "bfloat16"}, "model: embedding_dtype=bfloat16 needs a head of its own"),
        ({"model.z_loss": 1e30}, "model.z_loss = 1e+30: should be less than or equal to 1"),
        ({"model.attention_scale": 1e30}, "model.attention_scale = 1e+30: should be less than or equal to 1000"),
        ({"model.norm_eps": 1e30}, "model.norm_eps = 1e+30: should be less than or equal to 1"),
        ({"model.softcap": 1e30}, "model.softcap = 1e+30: should be less than or equal to 1000000"),
        ({"model.softcap": 1e-30}, "model.softcap: 1e-30 is below 0.001; 0 switches the bound off"),
        (
            {"model.positions": "learned", "model.rotary_base": 500.0},
            "model.rotary_base = 500.0: has no effect with positions=learned; leave it out",
        ),
        ({"model.softcap_form": "tanh"}, "model.softcap_form = 'tanh': has no effect with softcap=0; leave it out"),
        ({"model.kind": "llama"}, "model.kind: unknown decoder 'llama'; known: gpt, transformer"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "".join(value),
)
def test_parts_that_do_not_fit_are_one_line(make: Make, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as error:
        make("llama-tiny", **{key.replace(".", "__"): value for key, value in changes.items()})
    assert f"test: {words}" in str(error.value)
    assert "\n" not in str(error.value)


def test_keys_of_a_preset_that_have_no_effect_become_defaults(make: Make) -> None:
    """Else a printed configuration, which has all keys, would be refused. Defaults may be given."""
    changes: dict[str, Any] = {"model__positions": "learned", "model__softcap": 0.0}
    model = make("track3-small", **changes, model__rotary_base=10_000.0, model__softcap_form="sqrt").model.model_dump()
    assert model == make("llama-tiny", **{f"model__{key}": value for key, value in model.items()}).model.model_dump()
    assert (model["rotary_fraction"], model["rotary_endpoint"], model["qk_norm"]) == (1.0, False, True)


def test_a_run_may_have_keys_without_effect(make: Make) -> None:
    """One of an older version can be resumed."""
    values = preset_layer("gpt", "track3-small").values
    saved = Layer("run/config.json", {**values, "model.positions": "learned"})
    assert resolve([saved]).model.model_dump()["rotary_base"] == 1024.0


LIMITS: dict[str, dict[str, Any]] = {
    "z_loss": {"model__z_loss": 1.0}, "attention_scale": {"model__attention_scale": 1000.0},
    "norm_eps": {"model__norm_eps": 1.0}, "high softcap": {"model__softcap": 1e6},
    "low softcap": {"model__softcap": 1e-3}, "rotary_base": {"model__rotary_base": 1e300},
}  # fmt: skip


@pytest.mark.parametrize("changes", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("preset", ["llama-tiny", "track3-small"])
def test_a_run_with_a_number_at_its_limit_trains(
    preset: str, changes: dict[str, Any], make: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    """Logits of track 3 are exactly 0 at first."""
    rows = train(make(preset, training__precision="bf16", **changes), tmp_path / "run", reporter)
    assert rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_printed_configuration_reads_as_itself(preset: str, tmp_path: Path) -> None:
    """Also one with what the preset has switched off."""

    def printed(*words: object) -> str:
        return CliRunner().invoke(app, ["train", "gpt", *map(str, words), "--print-config"]).stdout

    first = printed(
        "--preset",
        preset,
        *[f"--set=model.{each}" for each in ("softcap=0", "attention_scale=0.5", "positions=learned")],
    )
    (tmp_path / "my.toml").write_text(first, encoding="utf-8")
    assert printed("--config", tmp_path / "my.toml") == first
    config = load_run_config(tomllib.loads(first))
    assert (config.model.softcap, config.model.attention_scale) == (0.0, 0.5)  # type: ignore[attr-defined]
