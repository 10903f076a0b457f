"""What a run folder tells others: that somebody trains there, and that a run diverged."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from pipelines.config import RunConfig
from pipelines.errors import Diverged, UsageError
from pipelines.training.gpt_task import GPTTask
from pipelines.training.run_folder import Divergence, RunFolder
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
    assert folder.is_locked()
    with pytest.raises(UsageError, match="another process trains here"):
        train(small_config(training__steps=2), folder.path, reporter, resume=resume)
    other.kill()
    other.wait()
    assert not folder.is_locked(), "a killed process holds no lock"
    assert sorted(path for path in folder.path.rglob("*") if path.name != ".lock") == [
        path for path in before if path.name != ".lock"
    ]
    train(small_config(training__steps=2), folder.path, reporter, resume=resume)
    assert not folder.is_locked()


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
    with pytest.raises(UsageError, match="holds a run already"):
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
