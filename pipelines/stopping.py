"""Signals: turn SIGTERM, SIGINT and SIGHUP into a request that a loop reads; handle Ctrl-C everywhere else."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ended before there was anything to save (128 + SIGINT)."""

INTERRUPTED_LINE = "stopped: interrupted; unsaved work is lost"


class StopRequest:
    """Whether a signal has asked the run to save and stop."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def __bool__(self) -> bool:
        return self.signal_name is not None


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn the first SIGTERM, SIGINT or SIGHUP into a request; a second SIGINT interrupts at once.

    An ignored SIGHUP, as under nohup, stays ignored.
    """
    request = StopRequest()
    if interrupted():  # before this call, and a library suppressed the `KeyboardInterrupt`
        request.signal_name = signal.SIGINT.name

    def request_stop(number: int, frame: FrameType | None) -> None:
        if request and number == signal.SIGINT:
            _interrupt(number, frame)
        request.signal_name = signal.Signals(number).name

    with handling_stop_signals(request_stop):
        yield request


@contextlib.contextmanager
def handling_stop_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Context manager in which `handler` receives the signals that request to save and stop."""
    before = {number: signal.signal(number, handler) for number in stop_signals()}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def stop_signals() -> list[signal.Signals]:
    """Return the signals that request to save and stop."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([] if ignored else [signal.SIGHUP])]


_interruptions = 0


def interrupted() -> bool:
    """Whether Ctrl-C interrupted this process, even if a library replaced the `KeyboardInterrupt` by another error."""
    return _interruptions > 0


def catch_ctrl_c() -> None:
    """Make Ctrl-C set `interrupted` and raise `KeyboardInterrupt`. During an import, or twice, it ends the process."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as for a background job
        signal.signal(signal.SIGINT, _interrupt)
        sys.unraisablehook = _end_if_interrupted


def _interrupt(_number: int, frame: FrameType | None) -> None:
    global _interruptions
    _interruptions += 1
    # Twice: a library may have suppressed the first exception, or the cleanup hangs. During an import: C++ libraries
    # abort when it is interrupted, and there is nothing to clean up yet.
    if _interruptions > 1 or _is_importing(frame):
        _end_interrupted()
    raise KeyboardInterrupt


def _end_interrupted() -> None:
    with contextlib.suppress(OSError):
        # The progress line may have hidden the cursor.
        shown = "\x1b[?25h" if os.isatty(2) and os.environ.get("TERM", "dumb") != "dumb" else ""
        os.write(2, f"{shown}{INTERRUPTED_LINE}\n".encode())
    os._exit(INTERRUPTED)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    return frame is not None


def _end_if_interrupted(unraisable: sys.UnraisableHookArgs) -> None:
    """End the process on a `KeyboardInterrupt` that Python cannot raise, as in `__del__`; else it would be lost."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        _end_interrupted()
    sys.__unraisablehook__(unraisable)
