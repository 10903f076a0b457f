"""End a distributed run that hangs, and name the process that the others wait for."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Self

from torch.distributed import Store  # type: ignore[attr-defined]

_LONGEST_INTERVAL_S = 5.0
_INTERVALS_A_TIMEOUT = 20
_SILENT_INTERVALS = 4
"""A process (or the store) counts as lost after this many intervals without an update."""


@dataclass(frozen=True)
class _Sign:
    """Status that a process publishes in the store at every interval."""

    number: int
    host: str
    doing: str
    where: str
    stalled_s: float


@dataclass(frozen=True)
class _Seen:
    """Newest status of a process, and when this process first saw it, by its own clock: clocks of machines differ."""

    sign: _Sign
    at: float


class Watchdog:
    """Context manager that ends this process when the run makes no progress for `timeout_s` seconds.

    A stalled process reads the status of the others, calls `on_hang` with one line that names those that are lost or
    behind, and exits at once with code 1: a waiting collective cannot be interrupted. Time in which the process itself
    is suspended does not count.

    Args:
        store: the launcher's store, which all ranks share and which outlives each of them.
        rank: rank of this process, of `size`.
        timeout_s: longer than any step, validation batch or checkpoint takes.
        host: this machine's name.
        on_hang: called with the line, in the watchdog's thread.
    """

    def __init__(
        self, store: Store, rank: int, size: int, timeout_s: float, host: str, on_hang: Callable[[str], None]
    ) -> None:
        self._store = store
        self._rank = rank
        self._size = size
        self._timeout_s = timeout_s
        self._host = host
        self._on_hang = on_hang
        self._interval_s = min(_LONGEST_INTERVAL_S, timeout_s / _INTERVALS_A_TIMEOUT)
        self._doing = "the beginning"
        self._beats = 0
        self._stalled_s = 0.0
        self._seen: dict[int, _Seen] = {}
        self._looked_at = 0.0
        self._ended = threading.Event()
        # Two threads, because a call to the store may never return if its machine is disconnected.
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._keep_in_touch, self._watch)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        for thread in self._threads:  # a thread in a call to the store would abort Python at exit
            thread.join(_LONGEST_INTERVAL_S)

    def beat(self, doing: str) -> None:
        """Report progress; `doing` is what the run does now, such as "step 7"."""
        self._doing = doing
        self._beats += 1

    def _watch(self) -> None:
        beats = -1
        while not self._ended.wait(self._interval_s):
            if self._beats != beats:
                beats, self._stalled_s = self._beats, 0.0
                continue
            self._stalled_s += self._interval_s
            if self._stalled_s < self._timeout_s:
                continue
            reason = self._reason_to_end(time.monotonic())
            if reason is not None and not self._ended.is_set():
                self._on_hang(f"no progress for {self._timeout_s:g} s: {reason}")
                os._exit(1)

    def _keep_in_touch(self) -> None:
        number = 0
        try:
            store = self._store.clone()  # the main thread may block the original while it waits
            while not self._ended.is_set():
                number += 1
                sign = _Sign(number, self._host, self._doing, _main_thread_place(), self._stalled_s)
                store.set(_key(self._rank), json.dumps(asdict(sign)))
                if self._stalled_s >= self._timeout_s / 2:
                    self._look_at_all(store)
                self._ended.wait(self._interval_s)
        except RuntimeError:
            return  # the store is gone; the other thread notices that `_looked_at` is old

    def _look_at_all(self, store: Store) -> None:
        now = time.monotonic()
        for rank in range(self._size):
            if not store.check([_key(rank)]):
                continue
            sign = _Sign(**json.loads(store.get(_key(rank))))
            seen = self._seen.get(rank)
            if seen is None or seen.sign.number != sign.number:
                self._seen[rank] = _Seen(sign, now)
        self._looked_at = now

    def _reason_to_end(self, now: float) -> str | None:
        """Return which processes are lost or behind; None while any process makes progress: others may wait for it."""
        margin_s = _SILENT_INTERVALS * self._interval_s
        if now - self._looked_at > margin_s:
            return f"the launcher's store does not answer {self._host}: the network is down, or the launcher has ended"
        seen = dict(self._seen)
        silent = [rank for rank in range(self._size) if rank not in seen or now - seen[rank].at > margin_s]
        if silent:
            return f"{_names(silent, seen)} {_verb(silent, 'does', 'do')} not respond, last at " + ", ".join(
                sorted({seen[rank].sign.doing if rank in seen else "the start" for rank in silent})
            )
        stalled_s = {rank: one.sign.stalled_s for rank, one in seen.items()}
        newest_s = min(stalled_s.values())
        if newest_s < self._timeout_s / 2:
            return None
        behind = [rank for rank in range(self._size) if stalled_s[rank] > newest_s + margin_s]
        if behind:
            doing = ", ".join(sorted({seen[rank].sign.doing for rank in behind}))
            return f"{_names(behind, seen)} {_verb(behind, 'is', 'are')} still at {doing}; the others wait for it"
        return _places(seen)


def _key(rank: int) -> str:
    return f"watchdog/{rank}"


def _names(ranks: Sequence[int], seen: dict[int, _Seen]) -> str:
    return ", ".join(f"process {rank}" + (f" ({seen[rank].sign.host})" if rank in seen else "") for rank in ranks)


def _verb(ranks: Sequence[int], one: str, many: str) -> str:
    return one if len(ranks) == 1 else many


def _places(seen: dict[int, _Seen]) -> str:
    """Return where the processes are, grouped by place."""
    groups: dict[str, list[int]] = {}
    for rank, one in sorted(seen.items()):
        groups.setdefault(f"{one.sign.doing}, in {one.sign.where}", []).append(rank)
    return "; ".join(f"{_names(ranks, seen)} at {place}" for place, ranks in groups.items())


def _main_thread_place() -> str:
    """Return the innermost line of the main thread outside torch, such as "pipelines.training.loop:121"."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "torch":
        frame = frame.f_back
    return f"{frame.f_globals.get('__name__')}:{frame.f_lineno}" if frame is not None else "nowhere"
