"""Retries of network requests: how often, with which pauses, and in threads that may hang."""

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
"""Maximum number of failures in a row, without new data between them."""
DAMAGED_ATTEMPTS = 3
"""The same for damaged content."""
PAUSES_S = (1, 2, 4, 8, 16, 32, 60)
NO_NETWORK_S = 8.0
"""Timeout for a network that has never answered."""
STALL_S = 120.0
"""Timeout for a reader that returns no data."""
LONGEST_WAIT_S = 300.0
"""Maximum time added to `STALL_S` if the server asks the client to wait."""

_POLL_S = 0.1
_MESSAGES_AHEAD = 8


class Failed(Exception):
    """An attempt failed.

    `wait_s` is the pause that the server requests, `status` its HTTP status, where that matters.
    """

    def __init__(self, failure: Failure, wait_s: float = 0.0, *, status: int | None = None) -> None:
        super().__init__(failure.text)
        self.failure = failure
        self.status = status
        self.wait_s = wait_s


class RetryPolicy:
    """Counts failures in a row; limits pauses, stalls and the wait for a network that never answers.

    `no_network` returns the error message for a network that never answers from the cause (None: no response). `kept`
    says in errors what is kept. The policy never waits; the caller does.
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
        """Record the time of the first request."""
        self._asked_at = min(self._asked_at, time.monotonic())

    def answered(self) -> None:
        """Record that the network answered."""
        self._has_answered = True

    def advanced(self) -> None:
        """Record that new data arrived; the count of failures starts again."""
        self._has_answered = True
        self._failures = 0

    def expect_message(self, wait_s: float = 0.0) -> None:
        """Restart the stall timeout; the server has asked to wait `wait_s` seconds."""
        self._stalls_at = time.monotonic() + min(wait_s, LONGEST_WAIT_S) + STALL_S

    def check(self) -> None:
        """Raise `AsgoError` if the network has never answered, and `Failed` if the reader has stalled."""
        now = time.monotonic()
        self._check_network(None, now)
        if now > self._stalls_at:
            raise Failed(Failure(f"no data for {STALL_S:.0f} s", "unreachable"))

    def pause_after(self, place: str, error: Failed, shown: str | None = None) -> float:
        """Return the seconds to wait before the next attempt, and notify the user of the failure.

        `shown` replaces `place` at the start of the notice. Raises `AsgoError` or `UsageError` if there is no retry.
        """
        failure, shown = error.failure, f"{place}: " if shown is None else shown
        if failure.kind in ("usage", "lasting"):
            # The text may already name the place, with a row.
            text = failure.text if failure.text.startswith(place) else f"{place}: {failure.text}"
            raise (UsageError if failure.kind == "usage" else AsgoError)(text)
        self._failures += 1
        self._has_answered |= failure.kind in ("refused for now", "damaged")
        allowed = DAMAGED_ATTEMPTS if failure.kind == "damaged" else ATTEMPTS
        if self._failures >= allowed:
            raise AsgoError(
                f"{place}: gave up after {allowed} attempts ({failure.text}); {self._kept}: "
                "run the same command again to resume"
            )
        pause = max(PAUSES_S[min(self._failures, len(PAUSES_S)) - 1], min(error.wait_s, LONGEST_WAIT_S))
        self._check_network(failure.text, time.monotonic() + pause)
        self.notify(f"{shown}{failure.text}; attempt {self._failures + 1} of {allowed} in {pause:g} s")
        return pause

    def _check_network(self, why: str | None, then: float) -> None:
        """Raise `AsgoError` if the network has never answered and its timeout ends before `then`."""
        if not self._has_answered and then - self._asked_at > NO_NETWORK_S:
            raise AsgoError(self._no_network(why))


class Retries(RetryPolicy):
    """Retries work in background threads. All waits raise `RunInterrupted` on a `stop` request."""

    def __init__(self, advice: str, notify: Notify, stop: StopRequest) -> None:
        """`advice` says in errors what to do about a network that never answers."""

        def no_network(why: str | None) -> str:
            return f"no answer from the network ({why or 'no data'}); {advice}"

        super().__init__(no_network, notify, "partial files are kept")
        self._stop = stop

    def check_stop(self) -> None:
        """Raise `RunInterrupted` if a signal has requested a stop."""
        if self._stop:
            raise RunInterrupted(
                f"{self._stop.signal_name}: partial files are kept; run the same command again to resume"
            )

    def stoppable(self, progress: Progress) -> Progress:
        """Return `progress` with `check_stop` before each call."""

        def report(phase: str, done: int, total: int) -> None:
            self.check_stop()
            progress(phase, done, total)

        return report

    def call(self, place: str, attempt: Callable[[], T]) -> T:
        """Call `attempt` until it does not raise `Failed`, with pauses, and return its result.

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
        """Run `work` in a background thread; yield what it sends and raise what it raises.

        Raises `Failed` if no message arrives in time. The thread is then abandoned: Python cannot end a thread that
        hangs in a socket.
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
    """Ends an abandoned thread. A `BaseException`, so libraries do not handle it as an error."""


class _Background(Generic[T]):
    def __init__(self, work: Callable[[Send[T]], None]) -> None:
        self.ended = False
        self._messages: queue.Queue[T | _End] = queue.Queue(_MESSAGES_AHEAD)
        self._abandoned = threading.Event()
        threading.Thread(target=self._run, args=(work,), daemon=True).start()

    def receive(self, timeout: float) -> Iterator[T]:
        """Yield one message or none; raise the error that ended the thread."""
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
