"""Checkpoints written while training goes on: it waits only for the copy to host memory."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from pipelines.training.checkpoint import Snapshot, write_snapshot
from pipelines.training.run_folder import RunFolder


class CheckpointWriter:
    """Writes one snapshot at a time, in a thread; a context manager that waits for the last one.

    What the disk refuses is raised as `AsgoError` by the next call of any method.
    """

    def __init__(self, folder: RunFolder, keep: int) -> None:
        self._folder = folder
        self._keep = keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[float] | None = None
        self.seconds = 0.0
        """What the last one took to write."""

    def write(self, snapshot: Snapshot) -> None:
        """Begin to write, when the one before is on the disk."""
        self.wait()
        self._writing = self._thread.submit(self._write, snapshot)

    def check(self) -> None:
        """Raise what went wrong meanwhile; does not wait."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until everything is on the disk."""
        writing, self._writing = self._writing, None
        if writing is not None:
            self.seconds = writing.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        if error is None:
            self.wait()

    def _write(self, snapshot: Snapshot) -> float:
        start = time.perf_counter()
        write_snapshot(self._folder.checkpoints, snapshot, self._keep, self._folder.settle)
        self._folder.mark_saved()
        return time.perf_counter() - start
