"""Work for several threads, watched and ended by the one that gave it to them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

_POLL_S = 0.1


@dataclass
class Tally:
    """How much the threads have done, and whether they are to stop."""

    done: int = 0
    stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def advance(self, by: int) -> None:
        """Count what was done, in any unit."""
        with self._lock:
            self.done += by


def in_threads(
    jobs: Iterable[Callable[[], None]], workers: int, tally: Tally, tell: Callable[[int], None] = lambda done: None
) -> None:
    """Do all `jobs` in `workers` threads, and `tell` many times a second, in this thread, how much is done.

    What a job raises is raised here, and ends the others as what `tell` raises does: they are to look at `tally.stop`.
    """
    with ThreadPoolExecutor(workers) as pool:
        tell(0)
        try:
            pending = {pool.submit(job) for job in jobs}
            while pending:
                done, pending = wait(pending, _POLL_S, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                tell(tally.done)
        finally:
            tally.stop.set()
            pool.shutdown(cancel_futures=True)
