"""Shadow optimizers: right by independent runs, the same after a kill, and nothing that training feels."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from pipelines.config import RunConfig
from pipelines.errors import AsgoError, UsageError
from pipelines.resolve import Layer, preset_layer, saved_layer
from pipelines.steps import resolve_run
from pipelines.training.gpt_task import GPTTask
from pipelines.training.run_folder import RunFolder
from pipelines.training.shadow_file import RUN, ShadowRecords
from pipelines.training.shadows import _singular_values
from pipelines.training.train import train
from tests.conftest import SMALL, SilentReporter
from tests.long import long
from tests.pipelines.training.processes import Job, carry_out
from tests.pipelines.training.test_layer_statistics import killed_at
from tests.pipelines.training.test_resume import assert_same_run, without_times

Make = Callable[..., RunConfig]
NAMES = ["asgo", "adamw:lr=0.002", "torch.NAdam"]


@pytest.fixture
def make(token_folder: Path) -> Make:
    """Make the configuration of a small run from flags; keywords are dotted keys with `__` for the dot."""

    def make(**changes: Any) -> RunConfig:
        values = {key.replace("__", "."): value for key, value in changes.items()}
        layer = Layer("test", {**SMALL, "data.folder": str(token_folder), **values})
        return resolve_run([preset_layer("gpt", "tiny"), layer])

    return make


def records_of(run: Path) -> ShadowRecords:
    records = RunFolder(run).shadows.read()
    assert records is not None
    return records


def without_times_of(run: Path) -> list[Any]:
    """The records without the only values that differ between two equal runs."""
    text = json.dumps(records_of(run).records)
    return json.loads(text, object_hook=lambda o: {k: v for k, v in o.items() if k not in ("cost_ms", "step_ms")})


def tensors(run: Path, step: int, file: str) -> dict[str, Tensor]:
    return safetensors.torch.load_file(run / "checkpoints" / f"step-{step:08d}" / f"{file}.safetensors")


def update(run: Path, step: int) -> dict[str, Tensor]:
    """The change of the weights by a step, from checkpoints."""
    before = tensors(run, step - 1, "model")
    return {name: after.double() - before[name].double() for name, after in tensors(run, step, "model").items()}


def new_task(config: RunConfig) -> GPTTask:
    return GPTTask(config, torch.device("cpu"))  # type: ignore[arg-type]


def test_training_is_the_same_to_the_last_bit(make: Make, tmp_path: Path, reporter: SilentReporter) -> None:
    settings = {
        "optimizer__name": "asgo",
        "model__dropout": 0.2,
        "training__micro_batch_size": 2,
        "training__ema_decay": 0.9,
        "metrics__every": 1,
        "statistics__every": 2,
    }
    train(make(**settings), tmp_path / "without", reporter)
    train(make(**settings, shadows__optimizers=NAMES, shadows__every=2), tmp_path / "with", reporter)
    assert_same_run(tmp_path / "without", tmp_path / "with")
    assert not (tmp_path / "without" / "shadows.jsonl").exists()
    assert [record["step"] for record in records_of(tmp_path / "with").records] == [2, 4, 6]
    for record in records_of(tmp_path / "with").records:
        assert list(record["directions"]) == [RUN, *NAMES]
    assert any(note.startswith("shadow optimizers took ") for note in reporter.notes)


def test_the_shadow_of_the_same_optimizer_is_the_optimizer(
    make: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    """Its state, bit for bit, and its step, in every layer."""
    config = make(optimizer__name="muon", shadows__optimizers=["muon"], shadows__every=3)
    train(config, tmp_path / "run", reporter)
    own = tensors(tmp_path / "run", 6, "optimizer")
    shadow = tensors(tmp_path / "run", 6, "shadows")
    assert {f"0/{name}" for name in own} == shadow.keys()
    assert all(torch.equal(value, shadow[f"0/{name}"]) for name, value in own.items())
    for record in records_of(tmp_path / "run").records:
        run, muon = (record["directions"][name] for name in (RUN, "muon"))
        assert muon["updates"] == record["step"]
        assert muon["cosine"] == pytest.approx(1, abs=1e-12)
        assert muon["norm"] == run["norm"]
        assert muon["same_batch"]["own"] == run["same_batch"]["own"]
        assert muon["layers"].keys() == run["layers"].keys()
        assert all(
            layer == {**run["layers"][name], "cosine": layer["cosine"]} for name, layer in muon["layers"].items()
        )


def test_the_first_step_is_that_of_a_run_with_the_shadow_as_optimizer(
    make: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    """Before the first step, weights and gradients are equal. After it, only a shadow sees the run's gradients."""
    often: dict[str, Any] = {"checkpoint__every": 1, "checkpoint__keep": 9, "schedule__warmup_fraction": 0.0}
    train(make(optimizer__name="asgo", **often), tmp_path / "asgo", reporter)
    config = make(optimizer__name="adamw", shadows__optimizers=["asgo"], shadows__every=1, **often)
    train(config, tmp_path / "adamw", reporter)
    record = records_of(tmp_path / "adamw").records[0]
    torch.manual_seed(config.seed)
    start = {name: param.detach().double() for name, param in new_task(config).model.named_parameters()}
    own, other = (
        {name: value.double() - start[name] for name, value in tensors(tmp_path / run, 1, "model").items()}
        for run in ("adamw", "asgo")
    )
    found = record["directions"]["asgo"]
    for name, expected in other.items():
        layer = found["layers"][name]
        assert layer["norm"] == pytest.approx(float(expected.norm()), rel=1e-6)
        cosine = float((expected * own[name]).sum() / (expected.norm() * own[name].norm()))
        assert layer["cosine"] == pytest.approx(cosine, abs=1e-6)
        if expected.ndim == 2:
            values = np.linalg.svd(expected.numpy(), compute_uv=False)
            kept = values[np.linspace(0, len(values) - 1, min(len(values), 32)).round().astype(int)]
            assert layer["singular_values"] == pytest.approx(kept.tolist(), rel=1e-5, abs=1e-7 * values[0])
        else:
            assert layer["singular_values"] == []
    flat = [torch.cat([each[name].flatten() for name in other]) for each in (own, other)]
    assert found["norm"] == pytest.approx(float(flat[1].norm()), rel=1e-6)
    assert found["cosine"] == pytest.approx(float(torch.cosine_similarity(*flat, dim=0)), abs=1e-6)


def test_loss_changes_are_those_of_the_batches(make: Make, tmp_path: Path, reporter: SilentReporter) -> None:
    """Computed from the checkpoints around the step, on its batch and on the next."""
    often: dict[str, Any] = {"checkpoint__every": 1, "checkpoint__keep": 9, "training__micro_batch_size": 2}
    config = make(optimizer__name="adamw", shadows__optimizers=["muon"], shadows__every=4, **often)
    train(config, tmp_path / "run", reporter)
    record = records_of(tmp_path / "run").records[0]
    assert record["step"] == 4
    before, own = tensors(tmp_path / "run", 3, "model"), update(tmp_path / "run", 4)
    task = new_task(config)

    @torch.no_grad()
    def loss(step: int, factor: float) -> float:
        for name, param in task.model.named_parameters():
            param.copy_(before[name] + factor * own[name])
        return float(np.mean([float(task.loss(batch)) for batch in task.micro_batches(step)]))

    found, other = record["directions"][RUN], record["directions"]["muon"]
    for step, changes in ((3, found["same_batch"]), (4, found["held_out"])):
        expected = [loss(step, factor) - loss(step, 0.0) for factor in (0.5, 1.0, 2.0)]
        assert changes["at_lengths"] == pytest.approx(expected, abs=1e-5)
        assert changes["own"] == changes["at_lengths"][1]
    assert found["same_batch"]["own"] < 0
    # A step of length 1 in another direction differs from its own, unless it happens to be as long.
    assert other["same_batch"]["own"] != other["same_batch"]["at_lengths"][1]


def test_a_killed_run_ends_with_the_same_shadows(make: Make, tmp_path: Path, reporter: SilentReporter) -> None:
    config = make(shadows__optimizers=NAMES, shadows__every=1, checkpoint__every=4, training__steps=7)
    train(config, tmp_path / "whole", reporter)
    killed = tmp_path / "killed"
    killed_at(config, killed, 5, "checkpoints/step-00000004")
    with (killed / "shadows.jsonl").open("a") as file:
        file.write('{"step": 6, "cost')
    train(config, killed, reporter, resume=True)
    assert any("resuming from" in note and "step-00000004" in note for note in reporter.notes)
    assert without_times_of(killed) == without_times_of(tmp_path / "whole")
    whole, resumed = (tensors(run, 7, "shadows") for run in (tmp_path / "whole", killed))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_shadows_may_change_on_resume(make: Make, tmp_path: Path, reporter: SilentReporter) -> None:
    """A new one begins without a state, which is said; one that stays keeps its own; the run is the same."""
    settings: dict[str, Any] = {"checkpoint__every": 4, "shadows__every": 2}
    train(make(**settings, shadows__optimizers=["adamw"]), tmp_path / "whole", reporter)
    killed_at(make(**settings, shadows__optimizers=["adamw"]), tmp_path / "run", 5, "checkpoints/step-00000004")
    train(make(**settings, shadows__optimizers=["muon", "adamw"]), tmp_path / "run", reporter, resume=True)
    assert "shadow optimizers without a saved state begin at step 4: muon" in reporter.notes
    last, whole = (records_of(run).records[-1]["directions"] for run in (tmp_path / "run", tmp_path / "whole"))
    assert (last["muon"]["updates"], last["adamw"]["updates"]) == (2, 6)
    assert last["adamw"]["norm"] == whole["adamw"]["norm"]
    assert without_times(RunFolder(tmp_path / "run").rows()) == without_times(RunFolder(tmp_path / "whole").rows())


def test_settings_are_those_with_which_the_optimizer_would_train(make: Make) -> None:
    flags: dict[str, Any] = {"optimizer__name": "accasro", "optimizer__lr": 0.5, "optimizer__increment": 0.2}
    config = make(
        **flags, shadows__optimizers=["muon", "adamw:lr=0.125,betas=0.5,0.75"], **{"optimizers.muon.momentum": 0.5}
    )
    muon, adamw = config.shadows.optimizers.values()
    assert muon.optimizer.model_dump().items() >= {"name": "muon", "lr": 0.03, "momentum": 0.5}.items()
    assert adamw.optimizer.model_dump().items() >= {"lr": 0.125, "betas": (0.5, 0.75)}.items()
    assert (config.schedule.kind, muon.schedule.kind) == ("constant", "cosine")
    assert make(optimizer__name="muon").schedule == muon.schedule


def test_a_stored_run_keeps_the_settings_of_its_shadows(make: Make, tmp_path: Path, reporter: SilentReporter) -> None:
    config = make(shadows__optimizers=["muon:lr=0.5", "torch.NAdam"], **{"optimizers.muon.momentum": 0.5})
    train(config, tmp_path / "run", reporter)
    saved = saved_layer(tmp_path / "run", None)
    assert saved is not None
    assert resolve_run([saved]) == config
    again = resolve_run([saved, Layer("--set", {"shadows.optimizers": ["adamw", "muon:lr=0.5"]})])
    assert again.shadows.optimizers["muon:lr=0.5"] == config.shadows.optimizers["muon:lr=0.5"]
    assert again.shadows.optimizers["adamw"] == make(shadows__optimizers=["adamw"]).shadows.optimizers["adamw"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["muo"], r"^test: shadows\.optimizers: muo: unknown optimizer 'muo'; did you mean 'muon'\?"),
        (["muon", "muon"], r"^test: shadows\.optimizers: 'muon' is there twice; leave one out$"),
        (["muon:momentum"], r"^test: shadows\.optimizers: muon:momentum: 'momentum' is not key=value$"),
        (["muon:lr=-1"], r"^test: shadows\.optimizers: muon:lr=-1: optimizer\.lr = -1: should be greater"),
        (["muon:name=adamw"], r"^test: shadows\.optimizers: muon:name=adamw: name: not a setting"),
        (["torch.LBFGS"], r"^shadows\.optimizers: torch\.LBFGS: its step\(\) needs a closure"),
        (["torch.nn.Linear"], r"shadows\.optimizers: torch\.nn\.Linear|torch\.nn\.Linear"),
        ([3], r"^test: shadows\.optimizers is \[3\]: write a list of names, such as"),
        (5, r"^test: shadows\.optimizers is 5: write a list of names"),
    ],
)
def test_what_is_wrong_is_one_line(names: Any, message: str, make: Make) -> None:
    with pytest.raises(UsageError, match=message) as error:
        make(shadows__optimizers=names)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("muon.lr", r"test: shadows\.optimizers\.muon has no optimizer: write a list of names"),
        ("muon.optimizer.lr", r"test: shadows\.optimizers\.muon has no optimizer: write a list of names"),
        ('"torch.NAdam".lr', r'test: shadows\.optimizers\."torch\.NAdam"\.lr: unknown key; known: optimizer, schedule'),
    ],
)
def test_a_table_of_a_shadow_that_is_wrong_is_explained(key: str, message: str, make: Make) -> None:
    with pytest.raises(UsageError, match=message):
        make(**{f"shadows.optimizers.{key}": 0.5})


def test_settings_in_a_table_are_checked(make: Make) -> None:
    table = {"shadows.optimizers.muon.optimizer.name": "muon"}
    assert list(make(**table).shadows.optimizers) == ["muon"]
    with pytest.raises(UsageError, match=r"^test: shadows\.optimizers\.muon\.optimizer\.foo: unknown key; known: .*lr"):
        make(**table, **{"shadows.optimizers.muon.optimizer.foo": 1})
    with pytest.raises(UsageError, match=r"^test: shadows\.optimizers\.muon\.optimizer\.lr = -1: should be greater"):
        make(**table, **{"shadows.optimizers.muon.optimizer.lr": -1})


def test_a_shadow_that_cannot_step_is_named_as_a_shadow(make: Make, tmp_path: Path, reporter: SilentReporter) -> None:
    with pytest.raises(UsageError, match=r"^shadows\.optimizers: torch\.SparseAdam: a step with it raises"):
        train(make(shadows__optimizers=["torch.SparseAdam"]), tmp_path / "run", reporter)


def test_optimizers_with_modes_are_refused_before_anything_is_written(
    make: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    pytest.importorskip("pytorch_optimizer")
    config = make(shadows__optimizers=["pytorch_optimizer.ScheduleFreeAdamW"])
    with pytest.raises(UsageError, match=r"pytorch_optimizer\.ScheduleFreeAdamW trains with other weights"):
        train(config, tmp_path / "run", reporter)
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("setting", ["shard_optimizer", "shard_model"])
def test_shards_are_refused_before_anything_starts(setting: str, make: Make) -> None:
    with pytest.raises(UsageError, match=rf"shadows\.optimizers does not work with runtime\.{setting}"):
        make(shadows__optimizers=["muon"], **{f"runtime__{setting}": True})


def test_a_foreign_line_is_named(make: Make, tmp_path: Path, reporter: SilentReporter) -> None:
    train(make(shadows__optimizers=["muon"], shadows__every=3), tmp_path / "run", reporter)
    with (tmp_path / "run" / "shadows.jsonl").open("a") as file:
        file.write('{"step": 1}\n')
    with pytest.raises(AsgoError, match=r"shadows\.jsonl:4: not a line of shadow optimizers"):
        records_of(tmp_path / "run")


def test_singular_values_are_thinned_from_the_largest_to_the_smallest() -> None:
    matrix = torch.randn(100, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    expected = torch.linalg.svdvals(matrix.flatten(1).double())
    found = _singular_values(matrix)
    assert (len(found), found[0]) == (32, pytest.approx(float(expected[0])))
    assert found[-1] == pytest.approx(float(expected[-1]), rel=1e-4)
    assert found == sorted(found, reverse=True)
    assert _singular_values(torch.full((3, 3), math.nan)) == []


@long
def test_two_processes_record_once_and_train_the_same(make: Make, tmp_path: Path) -> None:
    without = make(optimizer__name="adamw", shadows__every=3)
    with_shadows = make(optimizer__name="adamw", shadows__every=3, shadows__optimizers=["asgo", "torch.NAdam"])
    carry_out([Job(without, tmp_path / "without"), Job(with_shadows, tmp_path / "with")], 2, tmp_path / "jobs")
    assert_same_run(tmp_path / "without", tmp_path / "with")
    assert [record["step"] for record in records_of(tmp_path / "with").records] == [3, 6]
