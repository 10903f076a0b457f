"""The batches of a source, from a reader process that is started again, after a pause, when it fails."""

from __future__ import annotations

import math
import multiprocessing
import re
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Self

from pipelines.data import retries
from pipelines.data.addresses import without_secrets
from pipelines.data.child import signals_held_back
from pipelines.data.corpus.reader import (
    Batch,
    Contact,
    End,
    Message,
    Notice,
    Ready,
    read_source,
)
from pipelines.data.corpus.sources import OpenSource, Position, Source
from pipelines.data.failure import Failure
from pipelines.errors import AsgoError, UsageError

_ASKED_TO_WAIT = re.compile(r"Rate limited\. Waiting ([\d.]+)s")


class Feed:
    """Reads ahead in a process of its own; a context manager that ends it.

    `poll` gives the batches from `start` on, each once and in order, whatever happens to the connection; `notify` is
    told of every failure and of the pause before the next attempt.
    """

    def __init__(self, source: Source, start: Position, notify: Callable[[str], None]) -> None:
        self.source = source
        self.opened: OpenSource | None = None
        self.ended = False
        self._next = start
        self._notify = notify
        self._reader: BaseProcess | None = None
        self._connection: Connection | None = None
        self._has_answered = source.folder is not None
        self._failures = 0
        self._asked_at = math.inf  # when the network was first asked
        self._start_at = self._patience_ends = 0.0

    def open(self, timeout: float) -> OpenSource | None:
        """The files of the source, or None if they are not known within `timeout` seconds. Raises as `poll` does."""
        deadline = time.monotonic() + timeout
        while self.opened is None and time.monotonic() < deadline:
            self._receive(max(0.0, deadline - time.monotonic()))
        return self.opened

    def poll(self, timeout: float) -> Batch | None:
        """The next batch, or None if none came within `timeout` seconds or `ended` is set.

        Raises `AsgoError` when the source is given up.
        """
        deadline = time.monotonic() + timeout
        while not self.ended:
            message = self._receive(max(0.0, deadline - time.monotonic()))
            if isinstance(message, Batch):
                return message
            if message is None and time.monotonic() >= deadline:
                return None
        return None

    def close(self) -> None:
        """End the reader at once, wherever it is."""
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
        """Wait for one message and take note of it."""
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
            message = Failure("the process that reads was lost (killed, perhaps for want of memory)", "unreachable")
            self._has_answered = True  # it is not the network that is missing
        self._heed(message)
        return message

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other_end = context.Pipe(duplex=False)[0:2]
        reader = context.Process(target=read_source, args=(other_end, self.source, self._next), daemon=True)
        with signals_held_back():
            reader.start()
        self._reader = reader
        other_end.close()
        self._patience_ends = time.monotonic() + retries.STALL_S

    def _heed(self, message: Message | None) -> None:
        now = time.monotonic()
        if message is None:
            self._check_patience(now)
            return
        if not isinstance(message, Notice):
            self._patience_ends = now + retries.STALL_S
        match message:
            case Ready():
                self._asked_at = min(self._asked_at, now)
            case Contact():
                self._has_answered = True
            case OpenSource():
                self._check_unchanged(message)
            case Batch(position=position):
                self._failures = 0
                self._next = position._replace(batch=position.batch + 1)
            case Notice(text):
                if wait := _ASKED_TO_WAIT.search(text):
                    self._patience_ends = now + min(float(wait[1]), retries.LONGEST_WAIT_S) + retries.STALL_S
                self._notify(text)
            case Failure():
                self._has_answered |= message.kind in ("refused for now", "damaged")
                self._fail(message)
            case End():
                self.ended = True

    def _check_unchanged(self, opened: OpenSource) -> None:
        if self.opened is not None and opened != self.opened:
            raise AsgoError(f"{self.source.name}: the files changed while they were being read")
        self.opened = opened
        if self.source.folder is None:  # the hub's files may change; the next attempt takes these
            self.source = replace(self.source, revision=opened.revision)

    def _check_patience(self, now: float) -> None:
        if not self._has_answered and now - self._asked_at > retries.NO_NETWORK_S:
            raise self._no_network("no answer")
        if now > self._patience_ends:
            self._fail(Failure(f"nothing came for {retries.STALL_S:.0f} s", "unreachable"))

    def _fail(self, failure: Failure) -> None:
        """Schedule another attempt, or give up."""
        self.close()
        self._failures += 1
        place = failure.file or self.source.name
        if failure.kind in ("usage", "lasting"):
            text = failure.text if failure.text.startswith(place) else f"{place}: {failure.text}"  # it may name a row
            raise (UsageError if failure.kind == "usage" else AsgoError)(text)
        allowed = retries.DAMAGED_ATTEMPTS if failure.kind == "damaged" else retries.ATTEMPTS
        if self._failures >= allowed:
            raise AsgoError(
                f"{place}: given up after {allowed} attempts ({failure.text}); "
                "what is written is kept: the same command goes on"
            )
        now = time.monotonic()
        pause = retries.PAUSES_S[min(self._failures, len(retries.PAUSES_S)) - 1]
        if not self._has_answered and now + pause - self._asked_at > retries.NO_NETWORK_S:
            raise self._no_network(failure.text)
        self._start_at = now + pause
        where = f"{failure.file.rpartition('/')[2]}: " if failure.file else ""
        self._notify(f"{where}{failure.text}; attempt {self._failures + 1} of {allowed} in {pause} s")

    def _no_network(self, why: str) -> AsgoError:
        from huggingface_hub.constants import ENDPOINT

        return AsgoError(
            f"{without_secrets(ENDPOINT)} cannot be reached ({why}); check the network, set HF_ENDPOINT to a mirror, "
            "or pass --source FOLDER with the files"
        )
