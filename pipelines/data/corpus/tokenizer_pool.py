"""Pool of tokenizer processes."""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from queue import SimpleQueue
from types import TracebackType
from typing import Self

from pipelines.data.child import begin_child, start_child
from pipelines.data.corpus.encode import Backend, BatchEncoder, EncodedBatch, best_backend
from pipelines.data.corpus.reader import TextBatch


class TokenizerPool:
    """`size` processes that encode batches; a context manager that ends them. Does not wait until they have started.

    Defaults: `workers`, one per CPU core; `backend`, gigatoken if installed. Each process has its own pipe, and a
    thread that waits for the result. The processes of `ProcessPoolExecutor` share one pipe: one that is killed while it
    sends leaves half a message, and the pool hangs.
    """

    def __init__(self, workers: int | None, backend: Backend | None) -> None:
        self.size = workers or os.cpu_count() or 1
        self._tokenizers = [_Tokenizer(backend or best_backend()) for _ in range(self.size)]
        self._idle: SimpleQueue[_Tokenizer] = SimpleQueue()
        for tokenizer in self._tokenizers:
            self._idle.put(tokenizer)
        self._threads = ThreadPoolExecutor(self.size)

    def submit(self, batch: TextBatch) -> Future[EncodedBatch]:
        """Encode a batch in a process. The future raises as `BatchEncoder.encode` does, or `BrokenExecutor`."""
        return self._threads.submit(self._encode, batch)

    def _encode(self, batch: TextBatch) -> EncodedBatch:
        tokenizer = self._idle.get()
        try:
            return tokenizer.encode(batch)
        finally:
            self._idle.put(tokenizer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
        for tokenizer in self._tokenizers:
            tokenizer.close()


class _Tokenizer:
    """One process and the pipe to it."""

    def __init__(self, backend: Backend) -> None:
        self._process, self._connection = start_child(_work, backend)

    def encode(self, batch: TextBatch) -> EncodedBatch:
        reply: EncodedBatch | Exception
        try:
            self._connection.send(batch)
            reply = self._connection.recv()
        except (EOFError, OSError):
            # Raised below, outside `except`: else it keeps the frames of `send`, whose buffers cause errors when
            # Python 3.13 exits.
            reply = BrokenExecutor()
        if isinstance(reply, Exception):
            raise reply
        return reply

    def close(self) -> None:
        self._connection.close()
        self._process.terminate()
        self._process.join()


def _work(connection: Connection, backend: Backend) -> None:
    """Main function of a process: receive batches and send their tokens, or an error, until the pipe is closed."""
    begin_child()
    encoder = BatchEncoder(backend)
    with contextlib.suppress(EOFError, OSError):
        while True:
            connection.send(_reply(encoder, connection.recv()))


def _reply(encoder: BatchEncoder, batch: TextBatch) -> EncodedBatch | Exception:
    try:
        return encoder.encode(batch)
    except Exception as error:
        return error
