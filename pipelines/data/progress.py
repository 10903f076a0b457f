"""Progress reports of long work, in threads and while hashing large files."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.errors import RunInterrupted

Progress = Callable[[str, int, int], None]
"""Called often as (phase, done, total). An exception that it raises ends the work."""

_POLL_S = 0.1
_BLOCK = 4 << 20


@dataclass
class Tally:
    """Counts the work of several threads, and tells them to stop."""

    done: int = 0
    stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def advance(self, by: int) -> None:
        """Add to `done`, in any unit. Raises `RunInterrupted` if the work is stopped."""
        if self.stop.is_set():
            raise RunInterrupted("stopped")
        with self._lock:
            self.done += by


def in_threads(
    jobs: Iterable[Callable[[], None]], workers: int, tally: Tally, report: Callable[[int], None] = lambda done: None
) -> None:
    """Run all `jobs` in `workers` threads; call `report` with `tally.done` several times a second, in this thread.

    Raises what a job or `report` raises; the other jobs then end at their next `tally.advance`.
    """
    with ThreadPoolExecutor(workers) as pool:
        report(0)
        try:
            pending = {pool.submit(job) for job in jobs}
            while pending:
                done, pending = wait(pending, _POLL_S, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                report(tally.done)
        finally:
            tally.stop.set()
            pool.shutdown(cancel_futures=True)


def digest_of(path: Path, algorithm: str, report: Callable[[int, int], None]) -> str:
    """Return the hexadecimal digest of a file.

    Calls `report` often as (bytes done, bytes in total). Raises `OSError`.
    """
    digest, done, block = hashlib.new(algorithm, usedforsecurity=False), 0, memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        while count := file.readinto(block):
            digest.update(block[:count])
            done += count
            report(done, size)
    return digest.hexdigest()
