"""A run that was stopped and resumed equals one that was not, bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from optim import OPTIMIZER_NAMES
from pipelines.config import GPTRunConfig, RunConfig
from pipelines.data.batches import open_token_data
from pipelines.errors import AsgoError, RunInterrupted, UsageError
from pipelines.training.gpt_task import GPTTask
from pipelines.training.metrics import Row
from pipelines.training.run_folder import RunFolder
from pipelines.training.train import train
from tests.conftest import SilentReporter
from tests.pipelines.training.double_precision import bound, double_precision

TIMES = {"step_ms", "optimizer_ms", "throughput", "elapsed_s"}
Make = Callable[..., RunConfig]


def without_times(rows: list[Row]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def final_tensors(run: Path, step: int = 6) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / f"step-{step:08d}"
    names = ("model", "optimizer", "rng-0")
    return {f"{n}:{k}": v for n in names for k, v in safetensors.torch.load_file(folder / f"{n}.safetensors").items()}


def assert_same_run(one: Path, other: Path, step: int = 6) -> None:
    mine, theirs = final_tensors(one, step), final_tensors(other, step)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
    assert without_times(RunFolder(one).rows()) == without_times(RunFolder(other).rows())


class Dies(Exception):
    """Stands for a process that is gone."""


def die_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Make training fail in the middle of a step (0-based), after part of its gradients."""
    whole = GPTTask.micro_batches

    def dying(self: GPTTask, at: int) -> Any:
        batches = whole(self, at)
        yield next(iter(batches))
        if at == step:
            raise Dies
        yield from batches

    monkeypatch.setattr(GPTTask, "micro_batches", dying)


@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_every_optimizer_resumes_exactly(
    name: str, small_config: Make, tmp_path: Path, reporter: SilentReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, accumulation, clipping, and a death between two checkpoints."""
    config = small_config(optimizer__name=name, model__dropout=0.2, training__micro_batch_size=2, metrics__every=1)
    train(config, tmp_path / "whole", reporter)
    with monkeypatch.context() as patch:
        die_at(patch, step=3)
        with pytest.raises(Dies):
            train(config, tmp_path / "resumed", reporter)
    train(config, tmp_path / "resumed", reporter, resume=True)
    assert any("step-00000002" in note for note in reporter.notes)
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_resumes_exactly(
    precision: str, small_config: Make, tmp_path: Path, reporter: SilentReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(training__precision=precision)
    rows = train(config, tmp_path / "whole", reporter)
    assert rows[-1]["loss"] < rows[0]["loss"]
    with monkeypatch.context() as patch:
        die_at(patch, step=4)
        with pytest.raises(Dies):
            train(config, tmp_path / "resumed", reporter)
    train(config, tmp_path / "resumed", reporter, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")


def test_accumulation_changes_nothing_but_rounding(
    small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    parts = small_config(evaluation__batches=None, training__micro_batch_size=1)
    with double_precision():
        rows = train(small_config(evaluation__batches=None), tmp_path / "whole", reporter)
        others = train(parts, tmp_path / "parts", reporter)
    for one, other in zip(rows, others, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=bound(6))


def test_validation_on_tokens_is_the_mean_over_the_first_windows_for_any_micro_batch(
    small_config: Make, token_folder: Path
) -> None:
    (shard,) = open_token_data(token_folder).validation
    tokens = torch.from_numpy(shard.read().astype("int64"))[: 9 * 16 + 1]
    for micro_batch_size in (1, 2, 4):
        amount = {"evaluation__batches": None, "evaluation__tokens": 9 * 16}
        config = small_config(**amount, training__micro_batch_size=micro_batch_size)
        assert isinstance(config, GPTRunConfig)
        with double_precision():
            task = GPTTask(config, torch.device("cpu"))
            metrics = task.evaluate(lambda: False)
            expected = task.loss((tokens[:-1].view(9, 16), tokens[1:].view(9, 16)))
        assert metrics == {"loss": pytest.approx(expected.item(), rel=1e-12)}


def test_resume_before_the_first_checkpoint_starts_again(
    small_config: Make, tmp_path: Path, reporter: SilentReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config()
    train(config, tmp_path / "whole", reporter)
    with monkeypatch.context() as patch:
        die_at(patch, step=1)
        with pytest.raises(Dies):
            train(config, tmp_path / "resumed", reporter)
    train(config, tmp_path / "resumed", reporter, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")


def test_resume_of_a_folder_that_does_not_exist_begins(
    small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    assert train(small_config(), tmp_path / "new", reporter, resume=True)[-1]["step"] == 6


def test_resume_of_a_finished_run_changes_nothing(small_config: Make, tmp_path: Path, reporter: SilentReporter) -> None:
    train(small_config(), tmp_path / "run", reporter)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    train(small_config(), tmp_path / "run", reporter, resume=True)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_an_existing_run_is_not_overwritten(small_config: Make, tmp_path: Path, reporter: SilentReporter) -> None:
    train(small_config(), tmp_path / "run", reporter)
    with pytest.raises(UsageError, match="--resume"):
        train(small_config(), tmp_path / "run", reporter)


def test_files_of_others_are_neither_in_the_way_nor_touched(
    small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    """A log that `tee` or Slurm writes into the run folder is there before the run."""
    run = tmp_path / "run"
    (run / "logs").mkdir(parents=True)
    (run / "thesis.tex").write_text("mine")
    train(small_config(), run, reporter)
    assert (run / "thesis.tex").read_text() == "mine"
    assert (run / "logs").is_dir()


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "manifest.json", "checkpoints/step-00000002/state.json", "tiny-asgo-s42/config.json"]
)
def test_what_a_new_run_would_overwrite_or_mix_with_is_named(
    name: str, small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.touch()
    with pytest.raises(UsageError, match=r"cannot begin a new run here: .*/run/.* exists; choose another --out"):
        train(small_config(), tmp_path / "run", reporter)
    assert [found for found in (tmp_path / "run").rglob("*") if found.is_file()] == [path]


def test_resume_with_another_configuration_says_what_differs(
    small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    train(small_config(), tmp_path / "run", reporter)
    with pytest.raises(UsageError) as error:
        train(small_config(training__steps=8, seed=1), tmp_path / "run", reporter, resume=True)
    assert str(error.value).splitlines() == [
        f"{tmp_path / 'run'}: cannot be resumed with another configuration: seed is 42 in the run, 1 now",
        f"{tmp_path / 'run'}: cannot be resumed with another configuration: training.steps is 6 in the run, 8 now",
        f"{tmp_path / 'run'}: the schedule depends on the number of steps; to train further, begin a new run there: "
        f"asgo train gpt --branch {tmp_path / 'run'} --steps 8 --out ANOTHER",
    ]
    train(small_config(checkpoint__every=3, checkpoint__keep=5), tmp_path / "run", reporter, resume=True)


def test_the_order_and_the_validation_of_a_run_stay_and_a_run_from_before_they_were_settings_resumes(
    small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    run, config = tmp_path / "run", small_config()
    train(config, run, reporter)
    other = small_config(data__order="sequential", evaluation__batches=None, evaluation__tokens=32)
    with pytest.raises(UsageError) as error:
        train(other, run, reporter, resume=True)
    assert [line.rpartition("configuration: ")[2] for line in str(error.value).splitlines()] == [
        "data.order is shuffled in the run, sequential now",
        "evaluation.batches is 2 in the run, None now",
        "evaluation.tokens is None in the run, 32 now",
    ]
    record = json.loads((run / "config.json").read_text())
    del record["config"]["data"]["order"], record["config"]["evaluation"]["tokens"]
    (run / "config.json").write_text(json.dumps(record))
    train(config, run, reporter, resume=True)


def test_resume_on_other_data_is_refused(small_config: Make, tmp_path: Path, reporter: SilentReporter) -> None:
    from pipelines.data.text_to_shards import prepare_text

    train(small_config(), tmp_path / "run", reporter)
    (tmp_path / "other.txt").write_text("abcdefgh " * 1000, encoding="utf-8")
    prepare_text([tmp_path / "other.txt"], tmp_path / "other", tokenizer="chars", val_fraction=0.1)
    with pytest.raises(UsageError, match="was trained on other data"):
        train(small_config(data__folder=str(tmp_path / "other")), tmp_path / "run", reporter, resume=True)


def test_resume_in_another_directory_asks_for_the_data(
    small_config: Make, tmp_path: Path, reporter: SilentReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run knows its data by the path that it was given, which may be a relative one."""
    data = Path(small_config().data.folder)
    monkeypatch.chdir(data.parent)
    config = small_config(data__folder=data.name)
    train(config, tmp_path / "run", reporter)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UsageError, match=rf"its data folder, {data.name}, does not exist in this directory.* --data FOLDER"
    ):
        train(config, tmp_path / "run", reporter, resume=True)
    train(small_config(), tmp_path / "run", reporter, resume=True)


@pytest.mark.parametrize("every", [2, 100])
def test_a_finished_run_whose_checkpoints_were_removed_is_left_as_it_is(
    every: int, small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    run = tmp_path / "run"
    rows = train(small_config(checkpoint__every=every), run, reporter)
    shutil.rmtree(run / "checkpoints")
    before = (run / "metrics.jsonl").read_bytes()
    assert train(small_config(), run, reporter, resume=True) == rows
    assert "already finished; its checkpoints were removed" in reporter.notes[-1]
    assert (run / "metrics.jsonl").read_bytes() == before


class DyingAt(SilentReporter):
    """Ends the run when the training loss of a step has been recorded."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def trained(self, row: Any) -> None:
        if row["step"] == self.step:
            raise Dies


def test_a_run_that_lost_its_checkpoints_in_the_middle_keeps_its_record(
    small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    run = tmp_path / "run"
    with pytest.raises(Dies):
        train(small_config(metrics__every=1), run, DyingAt(5))
    shutil.rmtree(run / "checkpoints")
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(
        AsgoError, match="cannot be resumed from step 5: its checkpoints were removed; nothing was changed"
    ):
        train(small_config(metrics__every=1), run, reporter, resume=True)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_record_stays_until_a_run_that_begins_again_has_made_it_again(
    small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    """As of a run that was killed before its first checkpoint; of several records the longest stays."""
    run, config = tmp_path / "run", small_config(checkpoint__every=100, metrics__every=1)
    with pytest.raises(Dies):
        train(config, run, DyingAt(5))
    before = (run / "metrics.jsonl").read_bytes()
    for _ in range(2):
        with pytest.raises(Dies):
            train(config, run, DyingAt(3), resume=True)
        assert (run / "metrics.old.jsonl").read_bytes() == before
    train(config, run, reporter, resume=True)
    assert not (run / "metrics.old.jsonl").exists()


def test_only_the_newest_checkpoints_stay(small_config: Make, tmp_path: Path, reporter: SilentReporter) -> None:
    train(small_config(checkpoint__every=1, checkpoint__keep=3), tmp_path / "run", reporter)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000005", "step-00000006"]


def test_a_kill_between_saving_and_pruning_leaves_no_checkpoint_too_many(
    small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    """It leaves what a run that keeps more leaves; after the last save, no other would prune it."""
    train(small_config(checkpoint__keep=3), tmp_path / "run", reporter)
    train(small_config(checkpoint__keep=1), tmp_path / "run", reporter, resume=True)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000006"]


def test_a_stop_during_validation_saves_and_repeats_the_validation(
    small_config: Make, tmp_path: Path, reporter: SilentReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request is polled between validation batches; the half-made figure is not recorded."""
    import os
    import signal

    config = small_config()
    train(config, tmp_path / "whole", reporter)
    with monkeypatch.context() as patch:
        evaluate = GPTTask.evaluate

        def interrupted(self: GPTTask, should_stop: Callable[[], bool]) -> Any:
            if self.model.token_embedding.weight.grad is None and RunFolder(tmp_path / "stopped").rows()[1:]:
                os.kill(os.getpid(), signal.SIGTERM)
            return evaluate(self, should_stop)

        patch.setattr(GPTTask, "evaluate", interrupted)
        with pytest.raises(RunInterrupted, match="SIGTERM at step 3: saved"):
            train(config, tmp_path / "stopped", reporter)
    assert [row["step"] for row in RunFolder(tmp_path / "stopped").rows() if row["split"] == "val"] == [0]
    train(config, tmp_path / "stopped", reporter, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
