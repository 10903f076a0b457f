"""Start and end the child processes of data preparation and of loaders."""

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
    """Start a process that runs `work(connection, *arguments)`; return it and the parent's end of the connection."""
    context = multiprocessing.get_context("spawn")
    connection, other_end = context.Pipe(duplex)
    process = context.Process(target=work, args=(other_end, *arguments), daemon=True)
    with signals_held_back(*hold_back):
        process.start()
    other_end.close()
    return process, connection


@contextlib.contextmanager
def signals_held_back(*more: signal.Signals) -> Iterator[None]:
    """Context manager: processes started in it block SIGINT, SIGHUP and the signals `more`.

    A terminal sends these signals to all its processes. Ctrl-C would end a child with a traceback until it has called
    `begin_child`.
    """
    # The first start of a process also starts the resource tracker, which unblocks SIGINT: start the tracker before.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP, *more})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_child() -> None:
    """Ignore Ctrl-C, because the parent ends its children, and exit if the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
