"""Progress of a sweep: on a terminal a bar per running slot; elsewhere a line per start, per end and per minute."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.progress import TaskID

from asgo_cli import console
from asgo_cli.progress import RunBars, accuracy_in_words, metrics_in_words
from pipelines.tasks import task_of

if TYPE_CHECKING:
    from pipelines.sweeps.status import RunStatus
    from pipelines.training.metrics import Row


class SweepProgress(RunBars):
    """Draws the progress of `count` runs on stderr."""

    def __init__(self, count: int | str) -> None:
        super().__init__()
        self._count = count
        self._started = 0
        self._bars: dict[int, TaskID] = {}
        self._positions: dict[int, str] = {}

    def started(self, run: RunStatus, slot: int) -> None:
        """Add a bar for the run."""
        self._started += 1
        steps = run.run.config.training.steps
        if console.is_live():
            self._bars[slot] = self._progress.add_task(run.run.name, total=steps, completed=run.step, metrics="")
        else:
            origin = f" from step {run.step:,}" if run.step else ""
            console.say(f"{run.run.name}: started{origin}, run {self._started} of {self._count}, slot {slot}")

    def progressed(self, run: RunStatus, slot: int, row: Row) -> None:
        """Move the run's bar."""
        if slot in self._bars:
            unit = task_of(run.run.config).short_unit
            self._progress.update(self._bars[slot], completed=row["step"], metrics=metrics_in_words(row, unit))
        steps = run.run.config.training.steps
        position = f"{run.run.name} step {row['step']}/{steps}, loss {row['loss']:.4f}"
        self._positions[slot] = position + accuracy_in_words(row, ", ")
        self._lines.say("; ".join(self._positions.values()))

    def ended(self, run: RunStatus, slot: int, how: str) -> None:
        """Replace the run's bar by a line that says how the run ended."""
        self._positions.pop(slot, None)
        if slot in self._bars:
            self._progress.remove_task(self._bars.pop(slot))
        console.say(f"{run.run.name}: {how}")
