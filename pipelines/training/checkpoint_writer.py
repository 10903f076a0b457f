"""Asynchronous checkpoints: training waits only for the copy to host memory."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from pipelines.training.checkpoint import Snapshot, write_snapshot
from pipelines.training.run_folder import RunFolder


class CheckpointWriter:
    """Context manager that writes one snapshot at a time, in a thread; waits for the last one at the end.

    If writing fails, the next call of any method raises the `AsgoError`.
    """

    def __init__(self, folder: RunFolder, keep: int) -> None:
        self._folder = folder
        self._keep = keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[float] | None = None
        self.seconds = 0.0
        """Time that the last finished checkpoint took."""

    def write(self, snapshot: Snapshot) -> None:
        """Start writing a snapshot; waits until the previous one is on disk."""
        self.wait()
        self._writing = self._thread.submit(self._write, snapshot)

    def check(self) -> None:
        """Raise the error of a finished write, if there was one. Does not wait."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the snapshot is on disk."""
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
