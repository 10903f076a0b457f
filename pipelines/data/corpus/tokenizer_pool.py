"""The tokenizer processes."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import Future, ProcessPoolExecutor
from types import TracebackType
from typing import Self

from pipelines.data.corpus.encode import Backend, EncodedBatch, begin_worker, best_backend, encode_in_worker
from pipelines.data.corpus.reader import Batch


class TokenizerPool:
    """`size` processes that encode batches; a context manager that ends them. They start at once, in the background.

    Without `workers`, one a processor; without `backend`, gigatoken where it is installed.
    """

    def __init__(self, workers: int | None, backend: Backend | None) -> None:
        self.size = workers or os.cpu_count() or 1
        self._executor = ProcessPoolExecutor(
            self.size,
            multiprocessing.get_context("spawn"),
            initializer=begin_worker,
            initargs=(backend or best_backend(),),
        )
        self._executor.submit(int)  # the first task starts all processes, while the source is being opened

    def submit(self, batch: Batch) -> Future[EncodedBatch]:
        """Have a batch encoded. The future raises what `BatchEncoder.encode` raises, or `BrokenProcessPool`."""
        return self._executor.submit(encode_in_worker, batch)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)
