"""Waiting for a network: work in a thread that can be left behind, and how often and how long to try again."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from pipelines.data.failure import Failure
from pipelines.errors import AsgoError, RunInterrupted
from pipelines.stopping import StopRequest

Notify = Callable[[str], None]
T = TypeVar("T")
Send = Callable[[T], None]

ATTEMPTS = 8
"""Failures in a row, without one batch between them, after which a source is given up."""
DAMAGED_ATTEMPTS = 3
"""The same for content that arrives, and is damaged."""
PAUSES_S = (1, 2, 4, 8, 16, 32, 60)
NO_NETWORK_S = 8.0
"""How long a network that has never answered is waited for."""
STALL_S = 120.0
"""How long a reader may bring nothing before it is taken for stuck."""
LONGEST_WAIT_S = 300.0
"""How much longer than that it may take when the server has asked to wait."""

_POLL_S = 0.1
_MESSAGES_AHEAD = 8


class Failed(Exception):
    """An attempt failed.

    `wait_s` is how long the server asks to be left alone, `status` what it answered, where that matters.
    """

    def __init__(self, failure: Failure, wait_s: float = 0.0, *, status: int | None = None) -> None:
        super().__init__(failure.text)
        self.failure = failure
        self.status = status
        self.wait_s = wait_s


class Patience:
    """Counts failures in a row and waits between attempts, within the bounds above.

    `unreachable` says what to do about a network that never answers. Everything that waits raises `RunInterrupted` when
    `stop` is asked for.
    """

    def __init__(self, unreachable: str, notify: Notify, stop: StopRequest) -> None:
        self.notify = notify
        self._unreachable = unreachable
        self._stop = stop
        self._failures = 0
        self._has_answered = False
        self._begun_at: float | None = None

    def answered(self) -> None:
        """Note that the network is there."""
        self._has_answered = True

    def advanced(self) -> None:
        """Note that something came that was not there before."""
        self._has_answered = True
        self._failures = 0

    def check_stop(self) -> None:
        """Raise `RunInterrupted` if a signal has asked to stop."""
        if self._stop:
            raise RunInterrupted(f"{self._stop.signal_name}: what is here is kept, the same command goes on")

    def failed(self, place: str, error: Failed) -> None:
        """Say what failed and wait; raise `AsgoError` if no other attempt is to be made."""
        failure = error.failure
        if failure.kind == "lasting":
            raise AsgoError(f"{place}: {failure.text}")
        self._failures += 1
        self._has_answered |= failure.kind in ("refused for now", "damaged")
        allowed = DAMAGED_ATTEMPTS if failure.kind == "damaged" else ATTEMPTS
        if self._failures >= allowed:
            raise AsgoError(
                f"{place}: given up after {allowed} attempts ({failure.text}); "
                "what is here is kept: the same command goes on"
            )
        pause = max(PAUSES_S[min(self._failures, len(PAUSES_S)) - 1], min(error.wait_s, LONGEST_WAIT_S))
        self._check_network(failure.text, time.monotonic() + pause)
        self.notify(f"{place}: {failure.text}; attempt {self._failures + 1} of {allowed} in {pause:.0f} s")
        self._wait(pause)

    def messages(self, work: Callable[[Send[T]], None]) -> Iterator[T]:
        """What `work` sends from a thread of its own, while it runs; the errors that end it are raised here.

        Raises `Failed` when nothing comes for too long. The thread is then left to itself: a library that hangs in a
        socket cannot be ended.
        """
        if self._begun_at is None:
            self._begun_at = time.monotonic()
        background = _Background(work)
        patience_ends = time.monotonic() + STALL_S
        try:
            while not background.ended:
                self.check_stop()
                for message in background.receive(_POLL_S):
                    patience_ends = time.monotonic() + STALL_S
                    yield message
                self._check_patience(patience_ends)
        finally:
            background.abandon()

    def _check_patience(self, patience_ends: float) -> None:
        now = time.monotonic()
        self._check_network("nothing came", now)
        if now > patience_ends:
            raise Failed(Failure(f"nothing came for {STALL_S:.0f} s", "unreachable"))

    def _check_network(self, why: str, then: float) -> None:
        """Raise `AsgoError` if the network has never answered, and will have had its time `then`."""
        if not self._has_answered and self._begun_at is not None and then - self._begun_at > NO_NETWORK_S:
            raise AsgoError(f"no answer from the network ({why}); {self._unreachable}")

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.check_stop()
            time.sleep(min(_POLL_S, left))


class _Abandoned(BaseException):
    """Nobody waits for this thread any more; no library is to take it for an error of its own."""


class _Background(Generic[T]):
    def __init__(self, work: Callable[[Send[T]], None]) -> None:
        self.ended = False
        self._messages: queue.Queue[T | _End] = queue.Queue(_MESSAGES_AHEAD)
        self._abandoned = threading.Event()
        threading.Thread(target=self._run, args=(work,), daemon=True).start()

    def receive(self, timeout: float) -> Iterator[T]:
        """One message or none; raises what ended the thread."""
        with contextlib.suppress(queue.Empty):
            message = self._messages.get(timeout=timeout)
            if not isinstance(message, _End):
                yield message
                return
            self.ended = True
            if message.error is not None:
                raise message.error

    def abandon(self) -> None:
        self._abandoned.set()

    def _run(self, work: Callable[[Send[T]], None]) -> None:
        error: Exception | None = None
        try:
            work(self._send)
        except _Abandoned:
            return
        except Exception as raised:
            error = raised
        with contextlib.suppress(_Abandoned):
            self._send(_End(error))

    def _send(self, message: T | _End) -> None:
        while not self._abandoned.is_set():
            with contextlib.suppress(queue.Full):
                return self._messages.put(message, timeout=_POLL_S)
        raise _Abandoned


class _End:
    def __init__(self, error: Exception | None) -> None:
        self.error = error
