"""Progress of training runs and benchmarks: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from asgo_cli import console
from asgo_cli.live import LiveProgress
from asgo_cli.worker import end_worker

if TYPE_CHECKING:
    from pipelines.training.metrics import Row


def metrics_in_words(row: Row, unit: str) -> str:
    """Format the metrics of a training row; `unit` is the unit of its throughput, such as "tok"."""
    accuracy = accuracy_in_words(row, "  ")
    return f"loss {row['loss']:.4f}{accuracy}  lr {row['lr']:.2e}  {row['throughput']:,.0f} {unit}/s"


def accuracy_in_words(row: Row, separator: str) -> str:
    """Format the top-1 accuracy of a row, after a separator; "" if it has none."""
    return f"{separator}top-1 {row['accuracy']:.1%}" if "accuracy" in row else ""


class RunBars:
    """Context manager that shows a bar for each run: name, steps and metrics.

    A narrow terminal cuts the metrics first.
    """

    def __init__(self) -> None:
        self._lines = console.MinuteLines()
        self._progress = LiveProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}", table_column=Column(ratio=6, no_wrap=True)),
            TimeRemainingColumn(compact=True),
            expand=True,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def note(self, message: str) -> None:
        """Write a line above the bars."""
        console.say(message)


class TrainingProgress(RunBars):
    """Draws the events of a training run on stderr."""

    def __init__(self, name: str, unit: str = "tok") -> None:
        super().__init__()
        self._name = name
        self._unit = unit
        self._total = 0
        self._metrics = ""
        self._validation = "-"
        self._bar = self._progress.add_task(name, metrics="", total=None)

    def begin(self, first_step: int, last_step: int) -> None:
        """Set the bar to the first step of the run."""
        self._total = last_step
        self._progress.reset(self._bar, total=last_step, completed=first_step)

    def trained(self, row: Row) -> None:
        """Move the bar."""
        self._metrics = f"{metrics_in_words(row, self._unit)}  "
        self._show(row)

    def validated(self, row: Row) -> None:
        """Show the new validation."""
        self._validation = f"{row['loss']:.4f}{accuracy_in_words(row, ', ')}"
        self._show(row)

    def _show(self, row: Row) -> None:
        step, text = row["step"], f"{self._metrics}val {self._validation}"
        self._progress.update(self._bar, completed=step, metrics=text)
        is_last = step == self._total
        if not is_last or row["split"] == "val":  # a validation follows the last update
            self._lines.say(f"{self._name}  step {step}/{self._total}  {text}", is_last=is_last)

    def hung(self, message: str) -> None:
        """Report that the run is stalled; the process ends afterwards."""
        end_worker("hung", 1, message)


class WorkProgress:
    """A bar on a terminal, shown while `bar` is entered; elsewhere one line a minute."""

    def __init__(self, *columns: ProgressColumn) -> None:
        self._lines = console.MinuteLines()
        self.bar = LiveProgress(TextColumn("{task.description}"), BarColumn(), *columns, transient=True)
        self._task = self.bar.add_task("", total=None)

    def _show(self, what: str, done: int, total: int | None, line: str) -> None:
        self.bar.update(self._task, description=what, completed=done, total=total)
        self._lines.say(line)


class TurnsProgress(WorkProgress):
    """Progress of a benchmark in turns, with the elapsed time."""

    def __init__(self) -> None:
        super().__init__(TimeElapsedColumn())

    def note(self, message: str) -> None:
        """Write a line above the bar."""
        console.say(message)

    def advance(self, what: str, done: int, total: int) -> None:
        """Show what is measured now."""
        self._show(what, done, total, f"{what} ({done} of {total} done)")


class PhaseProgress(WorkProgress):
    """Progress in phases, each from 0 to 100 %, with the remaining time of the phase."""

    def __init__(self) -> None:
        super().__init__(TaskProgressColumn(), TimeRemainingColumn())
        self._phase = ""

    def show(self, phase: str, done: int, total: int) -> None:
        """Show the progress of a phase; a new name begins a new phase."""
        if phase != self._phase:
            self._phase = phase
            self.bar.reset(self._task)
        self._show(phase, done, total or None, f"{phase}: {done / total:.1%}" if total else phase)
