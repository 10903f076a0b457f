"""The interface through which a run reports its progress; the command line implements it."""

from __future__ import annotations

from typing import Protocol

from pipelines.training.metrics import Row


class Reporter(Protocol):
    """Receives the events of a run, in order."""

    def begin(self, first_step: int, last_step: int) -> None:
        """Training begins; earlier processes made `first_step` steps."""

    def trained(self, row: Row) -> None:
        """A training loss was recorded."""

    def validated(self, row: Row) -> None:
        """A validation was recorded."""

    def note(self, message: str) -> None:
        """A message for the user."""

    def hung(self, message: str) -> None:
        """The watchdog is about to end this process. Called in the watchdog's thread."""
