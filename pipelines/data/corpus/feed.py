"""Receive the batches of a source from a reader process; restart the process, after a pause, if it fails."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Self

from pipelines.data.addresses import without_secrets
from pipelines.data.child import start_child
from pipelines.data.corpus.reader import (
    Contact,
    End,
    Message,
    Notice,
    Ready,
    TextBatch,
    read_source,
)
from pipelines.data.corpus.sources import CorpusSource, OpenSource, Position
from pipelines.data.failure import Failure
from pipelines.data.retries import Failed, RetryPolicy
from pipelines.errors import AsgoError

_ASKED_TO_WAIT = re.compile(r"Rate limited\. Waiting ([\d.]+)s")


class Feed:
    """Prefetches in a reader process; a context manager that ends the process.

    `poll` returns the batches from `start` on, each once and in order, also after failures. Each failure calls `notify`
    with its cause and the pause before the next attempt.
    """

    def __init__(self, source: CorpusSource, start: Position, notify: Callable[[str], None]) -> None:
        self.source = source
        self.opened: OpenSource | None = None
        self.ended = False
        self._next = start
        self._retries = RetryPolicy(_no_network, notify, "the written tokens are kept")
        self._reader: BaseProcess | None = None
        self._connection: Connection | None = None
        self._start_at = 0.0
        if source.folder is not None:
            self._retries.answered()

    def open(self, timeout: float) -> OpenSource | None:
        """Return the files of the source, or None if unknown after `timeout` seconds. Raises as `poll` does."""
        deadline = time.monotonic() + timeout
        while self.opened is None and time.monotonic() < deadline:
            self._receive(max(0.0, deadline - time.monotonic()))
        return self.opened

    def poll(self, timeout: float) -> TextBatch | None:
        """Return the next batch, or None if there is none after `timeout` seconds or `ended` is set.

        Raises `AsgoError` after too many failures.
        """
        deadline = time.monotonic() + timeout
        while not self.ended:
            message = self._receive(max(0.0, deadline - time.monotonic()))
            if isinstance(message, TextBatch):
                return message
            if message is None and time.monotonic() >= deadline:
                return None
        return None

    def close(self) -> None:
        """Kill the reader process."""
        if self._reader is not None:
            assert self._connection is not None
            self._reader.kill()
            self._reader.join()
            self._connection.close()
            self._reader = self._connection = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _receive(self, timeout: float) -> Message | None:
        """Wait for one message and handle it."""
        if self._reader is None:
            pause = self._start_at - time.monotonic()
            if pause > 0:
                time.sleep(min(pause, timeout))
                return None
            self._start()
        assert self._connection is not None
        message: Message | None = None
        try:
            if self._connection.poll(timeout):
                message = self._connection.recv()
        except (EOFError, OSError):
            message = Failure("the reader process was killed (perhaps out of memory)", "unreachable")
            self._retries.answered()  # the cause is not the network: do not apply its shorter timeout
        self._handle(message)
        return message

    def _start(self) -> None:
        self._reader, self._connection = start_child(read_source, self.source, self._next, duplex=False)
        self._retries.expect_message()

    def _handle(self, message: Message | None) -> None:
        if message is not None and not isinstance(message, Notice):
            self._retries.expect_message()
        match message:
            case None:
                try:
                    self._retries.check()
                except Failed as error:
                    self._restart_after(error.failure)
            case Ready():
                self._retries.asked()
            case Contact():
                self._retries.answered()
            case OpenSource():
                self._check_unchanged(message)
            case TextBatch(position=position):
                self._retries.advanced()
                self._next = position._replace(batch=position.batch + 1)
            case Notice(text):
                if wait := _ASKED_TO_WAIT.search(text):
                    self._retries.expect_message(float(wait[1]))
                self._retries.notify(text)
            case Failure():
                self._restart_after(message)
            case End():
                self.ended = True

    def _check_unchanged(self, opened: OpenSource) -> None:
        if self.opened is not None and opened != self.opened:
            raise AsgoError(f"{self.source.name}: the files changed while they were being read")
        self.opened = opened
        if self.source.folder is None:  # the hub's files may change: pin the revision for the next attempt
            self.source = replace(self.source, revision=opened.revision)

    def _restart_after(self, failure: Failure) -> None:
        """Schedule another attempt, or raise."""
        self.close()
        shown = f"{failure.file.rpartition('/')[2]}: " if failure.file else ""
        pause = self._retries.pause_after(failure.file or self.source.name, Failed(failure), shown)
        self._start_at = time.monotonic() + pause


def _no_network(why: str | None) -> str:
    from huggingface_hub.constants import ENDPOINT

    return (
        f"{without_secrets(ENDPOINT)} cannot be reached ({why or 'no answer'}); check the network, "
        "set HF_ENDPOINT to a mirror, or pass --source FOLDER with the files"
    )
