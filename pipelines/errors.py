"""Errors that users see. Each message is one line: where, what is wrong, what to do."""

from __future__ import annotations


class AsgoError(Exception):
    """The command failed because of its input, the disk or the run itself (exit code 1)."""

    exit_code = 1


class UsageError(AsgoError):
    """The command or the configuration is wrong (exit code 2).

    `str(error)` may have several lines, one for each problem.
    """

    exit_code = 2


class Diverged(AsgoError):
    """A loss or gradient is not finite. The same run would diverge again (exit code 1)."""

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)
        self.step = step


class RunInterrupted(AsgoError):
    """SIGTERM, SIGINT or SIGHUP stopped the run; everything is saved (exit code 75)."""

    exit_code = 75
