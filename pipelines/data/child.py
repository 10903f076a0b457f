"""Processes that a preparation or a loader starts."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import parent_process, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any


def start_child(
    work: Callable[..., None], *arguments: object, duplex: bool = True, hold_back: Sequence[signal.Signals] = ()
) -> tuple[BaseProcess, Connection[Any, Any]]:
    """Start a process that runs `work(connection, *arguments)`; returns it and the other end of its connection."""
    context = multiprocessing.get_context("spawn")
    connection, other_end = context.Pipe(duplex)
    process = context.Process(target=work, args=(other_end, *arguments), daemon=True)
    with signals_held_back(*hold_back):
        process.start()
    other_end.close()
    return process, connection


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
