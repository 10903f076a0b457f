"""Status of each run of a sweep, from its folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pipelines.config import differences
from pipelines.errors import AsgoError, UsageError
from pipelines.sweeps.definition import SweepRun
from pipelines.tasks import TASKS, task_of
from pipelines.training.run_folder import RunFolder, refuse_existing

State = Literal["new", "partial", "done"]
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class RunStatus:
    """A run and its progress."""

    run: SweepRun
    folder: Path
    step: int
    """Step of its newest valid checkpoint; the last step for a finished run whose checkpoints were removed."""
    begun: bool

    @property
    def state(self) -> State:
        """`done` after the last step, `partial` if the run has begun, else `new`."""
        if self.step == self.run.config.training.steps:
            return "done"
        return "partial" if self.begun else "new"

    @property
    def tokens(self) -> int:
        """Tokens (or images) of the whole run."""
        return self.run.samples * self.run.tokens_per_sample

    @property
    def tokens_left(self) -> int:
        """Tokens (or images) of the remaining steps."""
        training = self.run.config.training
        return (training.steps - self.step) * training.batch_size * self.run.tokens_per_sample

    @property
    def diverged(self) -> bool:
        """Whether its last attempt diverged."""
        return RunFolder(self.folder).divergence() is not None

    def final_metrics(self) -> dict[str, float]:
        """Return the task's metrics after the last step, by name; empty for a run that is not done."""
        rows = RunFolder(self.folder).rows() if self.state == "done" else []
        last: Mapping[str, Any] = next((row for row in reversed(rows) if row["split"] == "val"), {})
        return {metric.name: last[metric.name] for metric in task_of(self.run.config).metrics if metric.name in last}


def run_statuses(runs: Sequence[SweepRun], out: Path) -> list[RunStatus]:
    """Return the status of all runs. Raises `UsageError` with one line for each folder that holds something else."""
    return _for_each(runs, lambda run: run_status(run, out))


def run_status(run: SweepRun, out: Path) -> RunStatus:
    """Return the status of a run. Raises `AsgoError` if its folder holds something else or is unreadable."""
    folder = RunFolder(out / run.name)
    if not folder.exists():
        refuse_existing(folder)
        return RunStatus(run, folder.path, 0, begun=False)
    changed = differences(folder.config(), run.config)
    if changed:
        lines = (f"{folder.path}: {line}; choose another --out" for line in changed)
        raise UsageError("\n".join(lines))
    steps = run.config.training.steps
    if folder.lost_checkpoints() and folder.ends_at(steps):
        return RunStatus(run, folder.path, steps, begun=True)
    from pipelines.training.checkpoint import newest_checkpoint  # imports torch, which a new sweep can do without

    checkpoint, _skipped = newest_checkpoint(folder.checkpoints)
    return RunStatus(run, folder.path, 0 if checkpoint is None else checkpoint.step, begun=True)


def check_data(runs: Sequence[SweepRun]) -> None:
    """Open the data of all runs. Raises `UsageError` with one line for each folder that is not valid."""
    places = dict.fromkeys((run.config.task, run.config.data.folder) for run in runs)
    _for_each(places, lambda place: TASKS[place[0]].open_data(Path(place[1])))


def _for_each(items: Iterable[_Item], do: Callable[[_Item], _Result]) -> list[_Result]:
    """Return the results for all items. Raises `UsageError` with all problems, if there are any."""
    results, problems = [], []
    for item in items:
        try:
            results.append(do(item))
        except AsgoError as error:
            problems.append(str(error))
    if problems:
        raise UsageError("\n".join(problems))
    return results
