"""SIGTERM, SIGINT and SIGHUP as a request that the loop reads, not as an exception at a random place."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class StopRequest:
    """Whether a signal has asked the run to save and stop."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def __bool__(self) -> bool:
        return self.signal_name is not None


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn the first SIGTERM, SIGINT or SIGHUP (a closed terminal) into a request; a second SIGINT interrupts at once.

    A SIGHUP that is ignored, as under nohup, stays ignored.
    """
    request = StopRequest()

    def ask(number: int, _frame: FrameType | None) -> None:
        if request and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal_name = signal.Signals(number).name

    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
    numbers = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP} - ignored
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
