"""What a run folder tells others, and what happens to a run whose folder is taken away."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from pipelines.config import RunConfig
from pipelines.errors import AsgoError, Diverged, UsageError
from pipelines.storage import sync
from pipelines.training.gpt_task import GPTTask
from pipelines.training.metrics import Row
from pipelines.training.run_folder import Divergence, RunFolder
from pipelines.training.statistics_file import Header, Record
from pipelines.training.train import train
from tests.conftest import SilentReporter

Make = Callable[..., RunConfig]
HOLD = """
import sys
from pathlib import Path
from pipelines.training.run_folder import RunFolder
folder = RunFolder(Path(sys.argv[1]))
folder.lock()
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_in_which_another_process_trains_is_refused(
    resume: bool, small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    folder = RunFolder(tmp_path / "run")
    if resume:
        train(small_config(training__steps=2), folder.path, reporter)
    before = sorted(folder.path.rglob("*"))
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(UsageError, match="another process trains here"):
        train(small_config(training__steps=2), folder.path, reporter, resume=resume)
    other.kill()
    other.wait()
    assert sorted(path for path in folder.path.rglob("*") if path.name != ".lock") == [
        path for path in before if path.name != ".lock"
    ]
    train(small_config(training__steps=2), folder.path, reporter, resume=resume)
    folder.lock()  # which a killed process and a finished run hold no more
    folder.close()


def test_planted_links_are_not_written_through(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_text("theirs")
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    for path in (tmp_path / "run" / ".lock", run.statistics.path):
        path.symlink_to(theirs)
    with pytest.raises(OSError, match=r"\.lock"):
        run.lock()
    with pytest.raises(AsgoError, match=r"statistics\.jsonl"):
        run.statistics.append(Header(shapes={}, scale_edges=None), Record(step=1, cost_ms=1.0, layers={}))
    assert theirs.read_text() == "theirs"


def test_of_two_runs_that_begin_in_one_folder_the_second_finds_the_first_ones(
    small_config: Make, tmp_path: Path, reporter: SilentReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second has looked at the folder before the first began, and gets the lock when the first has ended."""
    config, path = small_config(training__steps=2), tmp_path / "run"
    lock = RunFolder.lock

    def after_another_run(folder: RunFolder) -> None:
        monkeypatch.setattr(RunFolder, "lock", lock)
        train(config, path, reporter)
        lock(folder)

    monkeypatch.setattr(RunFolder, "lock", after_another_run)
    with pytest.raises(UsageError, match="already holds a run"):
        train(config, path, reporter)


def test_a_run_that_diverged_says_so_until_it_is_continued(
    small_config: Make, tmp_path: Path, reporter: SilentReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "run")
    config = small_config(optimizer__name="adamw")
    loss = GPTTask.loss

    def not_finite(task: GPTTask, batch: tuple[Tensor, ...]) -> Tensor:
        return loss(task, batch) * (math.nan if task.model.training else 1)

    monkeypatch.setattr(GPTTask, "loss", not_finite)
    with pytest.raises(Diverged) as error:
        train(config, folder.path, reporter)
    assert folder.divergence() == Divergence(1, str(error.value))
    monkeypatch.undo()
    train(config, folder.path, reporter, resume=True)
    assert folder.divergence() is None


@pytest.mark.parametrize("anew", [False, True], ids=["deleted", "begun anew"])
@pytest.mark.parametrize("written_next", ["metrics", "checkpoint", "statistics"])
def test_a_run_whose_folder_is_taken_away_stops_and_touches_nothing(
    anew: bool,
    written_next: str,
    small_config: Make,
    tmp_path: Path,
    reporter: SilentReporter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the middle of a step: the folder is deleted, and another run may train to its end in its place."""
    path = tmp_path / "run"
    rare = {"metrics__every": 100, "evaluation__every": 100, "checkpoint__every": 100}
    often = {"metrics": "metrics__every", "checkpoint": "checkpoint__every", "statistics": "statistics__every"}
    config = small_config(**{**rare, often[written_next]: 1 if written_next == "metrics" else 4})
    other = small_config(training__steps=2, optimizer__lr=0.5)
    loss = GPTTask.loss
    calls = []

    def taken_away(task: GPTTask, batch: tuple[Tensor, ...]) -> Tensor:
        calls.append(task.model.training)
        if sum(calls) == 3:
            monkeypatch.setattr(GPTTask, "loss", loss)
            shutil.rmtree(path)
            if anew:
                train(other, path, SilentReporter())
                left.update(contents(path))
        return loss(task, batch)

    left: dict[Path, bytes] = {}
    monkeypatch.setattr(GPTTask, "loss", taken_away)
    with pytest.raises(AsgoError, match=f"{path}: deleted, moved or replaced while this run trained in it"):
        train(config, path, reporter)
    assert contents(path) == left
    assert path.exists() == anew


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_closing_a_folder_on_a_full_disk_does_not_hide_the_error(small_config: Make, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    folder = RunFolder(tmp_path / "run")
    folder.lock()
    folder.begin(small_config(), {}, "cpu")
    folder.continue_from([])
    assert folder._metrics is not None
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, folder._metrics.fileno())
    os.close(full)
    with pytest.raises(OSError, match="No space left") as error, contextlib.closing(folder):
        folder.append(Row(split="val", step=0, tokens=0, samples=0, epoch=0.0, elapsed_s=0.0, loss=1.0))
    assert error.value.filename == str(folder.metrics_path)


def test_what_no_checkpoint_holds_is_on_the_disk_with_each(
    small_config: Make, tmp_path: Path, reporter: SilentReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names of a new run and of the folders made for it, and its layer statistics, survive a power cut."""
    synced: list[Path] = []

    def recording(path: Path) -> None:
        synced.append(path)
        sync(path)

    monkeypatch.setattr("pipelines.storage.sync", recording)
    monkeypatch.setattr("pipelines.training.run_folder.sync", recording)
    run = tmp_path / "new" / "run"
    train(small_config(statistics__every=3), run, reporter)
    assert {tmp_path, tmp_path / "new"} <= set(synced[: synced.index(run)]), "before anything in it"
    published = [index for index, path in enumerate(synced) if path == run / "checkpoints"]
    written = synced.index(run / "statistics.jsonl")
    assert written < published[1], "the record of step 3 before the checkpoint of step 4"
