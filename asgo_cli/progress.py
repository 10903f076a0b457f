"""How a training run looks while it goes: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from asgo_cli import console

if TYPE_CHECKING:
    from pipelines.training.metrics import Row

_PLAIN_INTERVAL_S = 30.0


def figures(row: Row) -> str:
    """The figures of a training row in a few words."""
    return f"loss {row['loss']:.4f}  lr {row['lr']:.2e}  {row['throughput']:,.0f} tok/s"


class TrainingProgress:
    """Draws the events of a training run on stderr; a context manager."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._total = 0
        self._validation = "-"
        self._last_line_s = 0.0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            console=console.words,
            disable=not console.words.is_terminal,
        )
        self._bar = self._progress.add_task(name, figures="", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, first_step: int, last_step: int) -> None:
        """Set the bar to where the run begins."""
        self._total = last_step
        self._progress.reset(self._bar, total=last_step, completed=first_step)

    def trained(self, row: Row) -> None:
        """Move the bar; without a terminal, write a line now and then."""
        text = f"{figures(row)}  val {self._validation}"
        self._progress.update(self._bar, completed=row["step"], figures=text)
        now = time.monotonic()
        if not console.words.is_terminal and now - self._last_line_s >= _PLAIN_INTERVAL_S:
            self._last_line_s = now
            console.say(f"{self._name}  step {row['step']}/{self._total}  {figures(row)}")

    def validated(self, row: Row) -> None:
        """Show the new validation loss."""
        self._validation = f"{row['loss']:.4f}"
        if not console.words.is_terminal:
            console.say(f"{self._name}  step {row['step']}/{self._total}  val {self._validation}")

    def note(self, message: str) -> None:
        """Write a line above the bar."""
        console.say(message)
