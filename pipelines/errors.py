"""The errors that a user can cause or meet. Each message is one line: what is wrong, where, what to do."""

from __future__ import annotations


class AsgoError(Exception):
    """Failed at work: the input, the disk or the run itself is at fault (exit code 1)."""

    exit_code = 1


class UsageError(AsgoError):
    """The command or the configuration asks for something that cannot be (exit code 2).

    `str(error)` may hold several lines, one for each problem found.
    """

    exit_code = 2


class Diverged(AsgoError):
    """A loss or gradient was not finite; the same run would end the same way again (exit code 1)."""

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)
        self.step = step


class RunInterrupted(AsgoError):
    """Stopped by SIGTERM, SIGINT or SIGHUP, with everything saved (exit code 75)."""

    exit_code = 75
