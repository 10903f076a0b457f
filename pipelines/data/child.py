"""What every process that a preparation starts does first."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import parent_process, resource_tracker


@contextlib.contextmanager
def signals_held_back(*more: signal.Signals) -> Iterator[None]:
    """A process started in here meets no Ctrl-C, no closed terminal, and none of the signals `more`.

    They go to all processes at once. Before `begin_child`, Ctrl-C would end it with a traceback.
    """
    resource_tracker.ensure_running()  # comes before the first process, and would let Ctrl-C through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP, *more})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_child() -> None:
    """Leave Ctrl-C to the parent, which ends its children; and end when the parent is killed and cannot do that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
