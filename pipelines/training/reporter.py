"""What a run tells while it trains; the command line draws it, the loop does not care how."""

from __future__ import annotations

from typing import Protocol

from pipelines.training.metrics import Row


class Reporter(Protocol):
    """Receives the events of a run, in order."""

    def begin(self, first_step: int, last_step: int) -> None:
        """Training starts, after `first_step` steps of an earlier process."""

    def trained(self, row: Row) -> None:
        """A training loss was recorded."""

    def validated(self, row: Row) -> None:
        """A validation was recorded."""

    def note(self, message: str) -> None:
        """Something that the user should read."""

    def hung(self, message: str) -> None:
        """This process is about to end, since nothing moves any more; called in another thread than the others."""
