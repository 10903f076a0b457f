"""Retries of a network: how often, how long to pause, when to give up; and work in a thread that may hang."""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from pipelines.data.failure import Failure
from pipelines.data.progress import Progress
from pipelines.errors import AsgoError, RunInterrupted, UsageError
from pipelines.stopping import StopRequest

Notify = Callable[[str], None]
T = TypeVar("T")
Send = Callable[[T], None]

ATTEMPTS = 8
"""Failures in a row, without new data between them, after which a source is given up."""
DAMAGED_ATTEMPTS = 3
"""The same for content that arrives, and is damaged."""
PAUSES_S = (1, 2, 4, 8, 16, 32, 60)
NO_NETWORK_S = 8.0
"""How long a network that has never answered is waited for."""
STALL_S = 120.0
"""How long a reader may bring nothing before it counts as stuck."""
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


class RetryPolicy:
    """Counts failures in a row, and bounds pauses, stalls and the wait for a network that never answers.

    `no_network` makes the error message for the latter from its cause (None: silence); `kept` says what an error
    leaves. It never waits: the caller does.
    """

    def __init__(self, no_network: Callable[[str | None], str], notify: Notify, kept: str) -> None:
        self.notify = notify
        self._no_network = no_network
        self._kept = kept
        self._failures = 0
        self._has_answered = False
        self._asked_at = math.inf
        self._stalls_at = math.inf

    def asked(self) -> None:
        """Note that the network is asked from now on."""
        self._asked_at = min(self._asked_at, time.monotonic())

    def answered(self) -> None:
        """Note that the network is there."""
        self._has_answered = True

    def advanced(self) -> None:
        """Note that new data came."""
        self._has_answered = True
        self._failures = 0

    def expect_message(self, wait_s: float = 0.0) -> None:
        """Start the clock of a stall anew; the server has asked to wait so long."""
        self._stalls_at = time.monotonic() + min(wait_s, LONGEST_WAIT_S) + STALL_S

    def check(self) -> None:
        """Raise `AsgoError` if the network has never answered, and `Failed` if nothing came for too long."""
        now = time.monotonic()
        self._check_network(None, now)
        if now > self._stalls_at:
            raise Failed(Failure(f"nothing came for {STALL_S:.0f} s", "unreachable"))

    def pause_after(self, place: str, error: Failed, shown: str | None = None) -> float:
        """Seconds to wait before another attempt; says what failed in `shown` (without it, `place`).

        Raises `AsgoError` or `UsageError` if no other attempt is to be made.
        """
        failure, shown = error.failure, f"{place}: " if shown is None else shown
        if failure.kind in ("usage", "lasting"):
            text = failure.text if failure.text.startswith(place) else f"{place}: {failure.text}"  # it may name a row
            raise (UsageError if failure.kind == "usage" else AsgoError)(text)
        self._failures += 1
        self._has_answered |= failure.kind in ("refused for now", "damaged")
        allowed = DAMAGED_ATTEMPTS if failure.kind == "damaged" else ATTEMPTS
        if self._failures >= allowed:
            raise AsgoError(
                f"{place}: given up after {allowed} attempts ({failure.text}); {self._kept}: the same command goes on"
            )
        pause = max(PAUSES_S[min(self._failures, len(PAUSES_S)) - 1], min(error.wait_s, LONGEST_WAIT_S))
        self._check_network(failure.text, time.monotonic() + pause)
        self.notify(f"{shown}{failure.text}; attempt {self._failures + 1} of {allowed} in {pause:g} s")
        return pause

    def _check_network(self, why: str | None, then: float) -> None:
        """Raise `AsgoError` if the network has never answered, and will have had its time `then`."""
        if not self._has_answered and then - self._asked_at > NO_NETWORK_S:
            raise AsgoError(self._no_network(why))


class Retries(RetryPolicy):
    """A policy with work in threads of its own: what waits here raises `RunInterrupted` when `stop` is asked for."""

    def __init__(self, advice: str, notify: Notify, stop: StopRequest) -> None:
        """`advice` says what to do about a network that never answers."""

        def no_network(why: str | None) -> str:
            return f"no answer from the network ({why or 'nothing came'}); {advice}"

        super().__init__(no_network, notify, "what is here is kept")
        self._stop = stop

    def check_stop(self) -> None:
        """Raise `RunInterrupted` if a signal has asked to stop."""
        if self._stop:
            raise RunInterrupted(f"{self._stop.signal_name}: what is here is kept, the same command goes on")

    def stoppable(self, progress: Progress) -> Progress:
        """`progress`, after `check_stop`."""

        def tell(phase: str, done: int, total: int) -> None:
            self.check_stop()
            progress(phase, done, total)

        return tell

    def call(self, place: str, attempt: Callable[[], T]) -> T:
        """What `attempt` returns; while it raises `Failed`, report that, wait, and try again.

        Raises as `pause_after` does.
        """
        while True:
            try:
                return attempt()
            except Failed as error:
                self._wait(self.pause_after(place, error))

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.check_stop()
            time.sleep(min(_POLL_S, left))

    def messages(self, work: Callable[[Send[T]], None]) -> Iterator[T]:
        """What `work` sends from a thread of its own, while it runs; the errors that end it are raised here.

        Raises `Failed` when nothing comes for too long. The thread is then left to itself: a library that hangs in a
        socket cannot be ended.
        """
        self.asked()
        background = _Background(work)
        self.expect_message()
        try:
            while not background.ended:
                self.check_stop()
                for message in background.receive(_POLL_S):
                    self.expect_message()
                    yield message
                self.check()
        finally:
            background.abandon()


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
