"""Layer statistics: right by the weights that the run saved, the same after a kill, and nothing that training feels."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from pipelines.config import GPTRunConfig, RunConfig, differences, load_run_config
from pipelines.errors import AsgoError, UsageError
from pipelines.training import clock, layer_statistics
from pipelines.training.gpt_task import GPTTask
from pipelines.training.run_folder import RunFolder
from pipelines.training.statistics_file import Record, Statistics, read_statistics
from pipelines.training.train import train
from tests import forks
from tests.conftest import SilentReporter
from tests.long import long
from tests.pipelines.training.double_precision import bound, double_precision
from tests.pipelines.training.processes import Job, carry_out
from tests.pipelines.training.test_resume import assert_same_run

Make = Callable[..., RunConfig]
FLOAT32 = np.finfo(np.float32).eps


def statistics_of(run: Path) -> Statistics:
    statistics = read_statistics(run / "statistics.jsonl")
    assert statistics is not None
    return statistics


def without_cost(run: Path) -> list[Record]:
    return [Record(step=r["step"], cost_ms=0.0, layers=r["layers"]) for r in statistics_of(run).records]


def saved(run: Path, step: int, file: str) -> dict[str, np.ndarray[Any, Any]]:
    path = run / "checkpoints" / f"step-{step:08d}" / f"{file}.safetensors"
    return {name: np.float64(array) for name, array in safetensors.numpy.load_file(path).items()}


def every_step_saved(make: Make, name: str, **changes: Any) -> RunConfig:
    """A run that measures steps 2, 4, 6 and 7, and leaves a checkpoint of every step."""
    return make(
        optimizer__name=name,
        statistics__every=2,
        training__steps=7,
        checkpoint__every=1,
        checkpoint__keep=7,
        metrics__every=1,
        **changes,
    )


@pytest.mark.parametrize("name", ["adamw", "accasro", "asgo", "muon"])
def test_norms_are_those_of_the_saved_weights(
    name: str, small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    train(every_step_saved(small_config, name), tmp_path / "run", reporter)
    statistics = statistics_of(tmp_path / "run")
    assert [record["step"] for record in statistics.records] == [2, 4, 6, 7]
    for record in statistics.records:
        before, after = (saved(tmp_path / "run", step, "model") for step in (record["step"] - 1, record["step"]))
        assert record["layers"].keys() == before.keys() == statistics.header["shapes"].keys()
        assert record["cost_ms"] > 0
        for key, layer in record["layers"].items():
            assert list(before[key].shape) == statistics.header["shapes"][key]
            weight_norm, update_norm = np.linalg.norm(before[key]), np.linalg.norm(after[key] - before[key])
            assert update_norm > 0
            assert layer["weight_norm"] == pytest.approx(weight_norm, rel=1e-12)
            assert layer["update_norm"] == pytest.approx(update_norm, rel=1e-6)
            ratio = update_norm / weight_norm if weight_norm else None
            assert layer["update_to_weight"] == (ratio if ratio is None else pytest.approx(ratio, rel=1e-6))


@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_gradients_are_those_that_the_optimizer_gets(
    max_norm: float | None, small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    """In parts, of which the whole is recorded before clipping."""
    config = every_step_saved(small_config, "adamw", training__max_grad_norm=max_norm)
    rows = {row["step"]: row for row in train(config, tmp_path / "run", reporter) if row["split"] == "train"}
    for record in statistics_of(tmp_path / "run").records:
        parts = [layer["grad_norm"] for layer in record["layers"].values()]
        total = rows[record["step"]]["grad_norm"]
        assert total > 0.1
        assert np.linalg.norm(np.array(parts, np.float64)) == pytest.approx(max_norm or total, rel=1e-5)


def test_scales_are_those_of_the_saved_state(small_config: Make, tmp_path: Path, reporter: SilentReporter) -> None:
    config = every_step_saved(small_config, "accasro", optimizer__increment=4.0, optimizer__decrement=0.9)
    train(config, tmp_path / "run", reporter)
    statistics = statistics_of(tmp_path / "run")
    edges = np.array(statistics.header["scale_edges"])
    for record in statistics.records:
        state = saved(tmp_path / "run", record["step"], "optimizer")
        for key, layer in record["layers"].items():
            scale, found = state[f"{key}/scale"].ravel(), layer["scale"]
            assert found["mean"] == pytest.approx(scale.mean(), rel=1e-6)
            assert found["at_min"] == (scale == np.float32(0.1)).mean()
            assert found["at_max"] == (scale == np.float32(5.0)).mean()
            inside = np.clip(scale, edges[0] * (1 + 1e-6), edges[-1] * (1 - 1e-6))
            assert found["histogram"] == np.histogram(inside, edges)[0].tolist()
    last = statistics.records[-1]["layers"].values()
    assert any(layer["scale"]["at_min"] > 0 for layer in last)
    assert any(layer["scale"]["at_max"] > 0 for layer in last)


@pytest.mark.parametrize("by_heads", [False, True])
def test_conditions_are_those_of_the_saved_state(
    by_heads: bool, small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    """Where a matrix is singular up to float32, there is no number but a rank."""
    config = every_step_saved(small_config, "asgo", optimizer__by_heads=by_heads)
    train(config, tmp_path / "run", reporter)
    singular = []
    for record in statistics_of(tmp_path / "run").records:
        state = saved(tmp_path / "run", record["step"], "optimizer")
        for key, layer in record["layers"].items():
            factors = [
                matrix for name, matrix in state.items() if name.startswith(f"{key}/preconditioner") and matrix.ndim
            ]
            assert ("preconditioners" in layer) == bool(factors)
            if not factors:
                continue
            assert len(factors) == (2 if by_heads and ("query" in key or "key" in key) else 1)
            eigenvalues = np.linalg.eigvalsh(np.stack(factors))
            counted = (eigenvalues > FLOAT32 * eigenvalues[:, -1:]).sum(1)
            is_full = counted == eigenvalues.shape[1]
            conditions = sorted(np.where(is_full, eigenvalues[:, -1] / eigenvalues[:, 0], np.inf))
            expected = [conditions[0], conditions[-1]]
            found = layer["preconditioners"]["preconditioner"]
            assert (found["side"], found["rank"]) == (eigenvalues.shape[1], counted.min())
            for value, exact in zip([found["condition"], found["largest_condition"]], expected, strict=True):
                assert value == (None if np.isinf(exact) else pytest.approx(exact, rel=1e-6))
            singular.append(found["largest_condition"] is None)
    assert 0 < sum(singular) < len(singular)


@pytest.mark.parametrize("name", ["accasro", "asgo", "adamw"])
def test_training_is_the_same_to_the_last_bit(
    name: str, small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    settings = {"optimizer__name": name, "model__dropout": 0.2, "training__micro_batch_size": 2, "metrics__every": 1}
    train(small_config(**settings), tmp_path / "without", reporter)
    assert not reporter.notes
    train(small_config(**settings, statistics__every=1), tmp_path / "with", reporter)
    assert_same_run(tmp_path / "without", tmp_path / "with")
    assert len(statistics_of(tmp_path / "with").records) == 6
    assert not (tmp_path / "without" / "statistics.jsonl").exists()
    assert [note for note in reporter.notes if note.startswith("layer statistics took ")] == reporter.notes[-1:]


def test_measuring_counts_to_no_step(
    small_config: Make, tmp_path: Path, reporter: SilentReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that goes on by a millisecond when it is read, and by 1,000 s while scales are measured."""
    now = [0.0]

    def read() -> float:
        now[0] += 1e-3
        return now[0]

    def slow(optimizer: object) -> dict[Any, Any]:
        now[0] += 1e3
        return {}

    for module in (clock, layer_statistics):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=read))
    monkeypatch.setattr(layer_statistics, "scale_distributions", slow)
    rows = train(small_config(statistics__every=2, metrics__every=1), tmp_path / "run", reporter)
    assert [record["cost_ms"] > 1e6 for record in statistics_of(tmp_path / "run").records] == [True] * 3
    assert rows[-1]["elapsed_s"] < 1.0
    assert all(row["step_ms"] < 100 and row["optimizer_ms"] < 100 for row in rows if row["split"] == "train")
    assert reporter.notes[-1].startswith("layer statistics took 3000.0 s, in addition to 0.")


def train_until_killed(config: str, out: Path, step: int, saved: str) -> None:
    """A process that a SIGKILL ends in the middle of a step (0-based), when the file or folder `saved` is on disk."""
    whole = GPTTask.micro_batches

    def dying(self: GPTTask, at: int) -> Any:
        if at == step:
            while not (out / saved).exists():
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, at)

    GPTTask.micro_batches = dying  # type: ignore[method-assign]
    train(GPTRunConfig.model_validate_json(config), out, SilentReporter())


def killed_at(config: RunConfig, out: Path, step: int, saved: str) -> None:
    process = forks.start(train_until_killed, config.model_dump_json(), out, step, saved)
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("torn", ["", '{"step": 6, "cost_ms": 1.0, "la'], ids=["whole", "torn"])
def test_a_killed_run_ends_with_the_same_file(
    torn: str, small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    """The step after the last checkpoint is measured a second time, and told once."""
    config = small_config(statistics__every=1, checkpoint__every=4, training__steps=7)
    train(config, tmp_path / "whole", reporter)
    killed = tmp_path / "killed"
    killed_at(config, killed, 5, "checkpoints/step-00000004")
    assert [record["step"] for record in statistics_of(killed).records] == [1, 2, 3, 4, 5]
    with (killed / "statistics.jsonl").open("a") as file:
        file.write(torn)
    train(config, killed, reporter, resume=True)
    assert any("step-00000004" in note for note in reporter.notes)
    assert without_cost(killed) == without_cost(tmp_path / "whole")
    assert statistics_of(killed).header == statistics_of(tmp_path / "whole").header


def test_a_kill_in_the_first_line_leaves_nothing_behind(
    small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    config = small_config(statistics__every=3)
    train(config, tmp_path / "whole", reporter)
    killed_at(config, tmp_path / "killed", 1, "config.json")
    (tmp_path / "killed" / "statistics.jsonl").write_text('{"shapes": {"tok')
    train(config, tmp_path / "killed", reporter, resume=True)
    assert without_cost(tmp_path / "killed") == without_cost(tmp_path / "whole")


def test_a_run_of_before_statistics_can_be_resumed_with_them(
    small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    config = small_config()
    train(config, tmp_path / "run", reporter)
    old = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    del old["statistics"]
    assert differences(load_run_config(old), small_config(statistics__every=2)) == []
    train(small_config(statistics__every=2), tmp_path / "run", reporter, resume=True)  # it is done: nothing to measure
    assert not (tmp_path / "run" / "statistics.jsonl").exists()


@long
def test_two_processes_measure_what_one_does(small_config: Make, tmp_path: Path, reporter: SilentReporter) -> None:
    """In the sums over the batch, rounding apart; and write it once."""
    config = small_config(optimizer__name="adamw", statistics__every=3, training__max_grad_norm=1.0)
    with double_precision():
        train(config, tmp_path / "one", reporter)
    carry_out([Job(config, tmp_path / "two", double=True)], 2, tmp_path / "jobs")
    one, two = (statistics_of(tmp_path / run).records for run in ("one", "two"))
    assert [record["step"] for record in two] == [3, 6]
    for mine, theirs in zip(one, two, strict=True):
        assert mine["layers"].keys() == theirs["layers"].keys()
        for key, layer in mine["layers"].items():
            if key.endswith("key.bias"):  # has no gradient but rounding: it adds the same to all scores
                continue
            for figure in ("grad_norm", "weight_norm", "update_norm"):
                assert theirs["layers"][key][figure] == pytest.approx(layer[figure], rel=bound(6)), (key, figure)


@pytest.mark.parametrize("setting", ["shard_optimizer", "shard_model"])
def test_shares_are_refused_before_anything_starts(setting: str, small_config: Make) -> None:
    with pytest.raises(UsageError, match=rf"statistics\.every does not work with runtime\.{setting}"):
        small_config(statistics__every=10, **{f"runtime__{setting}": True})


def test_a_foreign_line_is_named(small_config: Make, tmp_path: Path, reporter: SilentReporter) -> None:
    train(small_config(statistics__every=3), tmp_path / "run", reporter)
    path = tmp_path / "run" / "statistics.jsonl"
    header, *records = path.read_text().splitlines()
    path.write_text("\n".join([header, '{"step": 1}', *records]) + "\n")
    with pytest.raises(AsgoError, match=r"statistics\.jsonl:2: not a line of layer statistics"):
        read_statistics(path)


def test_no_statistics_are_none(small_config: Make, tmp_path: Path, reporter: SilentReporter) -> None:
    train(small_config(), tmp_path / "run", reporter)
    assert read_statistics(tmp_path / "run" / "statistics.jsonl") is None
    assert RunFolder(tmp_path / "run").rows()
