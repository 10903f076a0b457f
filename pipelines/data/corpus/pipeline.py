"""Pass batches from the reader to the tokenizers to the shards; limits the number of batches in flight."""

from __future__ import annotations

import contextlib
import math
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Future
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from pathlib import Path

from pipelines.data.corpus.encode import EncodedBatch
from pipelines.data.corpus.feed import Feed
from pipelines.data.corpus.folder import Journal, LastBatch, save_journal
from pipelines.data.corpus.reader import TextBatch
from pipelines.data.corpus.split import SplitWriter
from pipelines.data.corpus.tokenizer_pool import TokenizerPool
from pipelines.errors import AsgoError, RunInterrupted
from pipelines.stopping import StopRequest

_SECONDS_BETWEEN_JOURNALS = 10.0
_POLL_S = 0.05
_BYTES_IN_FLIGHT = 128 << 20


@dataclass(frozen=True)
class Status:
    """Progress of a preparation. `documents`, `tokens` and `finished_shards` include earlier sessions.

    `tokens_per_s` is the rate of this session. `reading_share` and `tokenizing_share` are the fractions of its time
    that the writer waited for the source and for the tokenizers. `seconds_left` is None at first.
    """

    documents: int
    tokens: int
    tokens_wanted: int
    finished_shards: int
    tokens_per_s: float
    reading_share: float
    tokenizing_share: float
    seconds_left: float | None


class Pipeline:
    """Submits batches to the tokenizers and writes the results in the order of the source."""

    def __init__(
        self,
        feed: Feed,
        pool: TokenizerPool,
        writer: SplitWriter,
        folder: Path,
        journal: Journal,
        report: Callable[[Status], None],
    ) -> None:
        self.documents = journal.documents
        self._feed = feed
        self._pool = pool
        self._writer = writer
        self._window = 2 * pool.size + 2
        self._folder = folder
        self._journal = journal
        self._report = report
        self._pending: deque[tuple[TextBatch, Future[EncodedBatch]]] = deque()
        self._last = journal.last_batch
        self._clock = _Clock(writer.tokens)
        self._saved_at = time.monotonic()
        self._saved_shards = writer.finished_shards

    def run(self, stop: StopRequest) -> None:
        """Run until the training shards are full or the source ends. Raises as `prepare_corpus` does."""
        try:
            while not self._writer.is_full:
                if stop:
                    raise RunInterrupted(f"{stop.signal_name}: {self._kept()}")
                if not self._submit_one() and not self._write_one() and self._feed.ended:
                    break
        except BrokenExecutor:
            self._save()
            if stop:  # some schedulers send the signal to all processes, also to the tokenizers
                raise RunInterrupted(f"{stop.signal_name}: {self._kept()}") from None
            raise AsgoError(
                f"a tokenizer process was killed (perhaps out of memory; fewer --workers need less memory): "
                f"{self._kept()}"
            ) from None
        except AsgoError:
            self._save()
            raise
        self._save()

    def _kept(self) -> str:
        written = f"{self._writer.tokens:,} of {self._writer.tokens_wanted:,} tokens are written"
        return f"{written}; run the same command again to resume"

    def _submit_one(self) -> bool:
        """Submit a batch to the tokenizers, if there is one and the limit of batches in flight permits it."""
        in_flight = sum(len(batch.column) for batch, _ in self._pending)
        if len(self._pending) >= self._window or in_flight >= _BYTES_IN_FLIGHT or self._feed.ended:
            return False
        with self._clock.waiting_for("reading"):
            batch = self._feed.poll(0 if self._pending else _POLL_S)
        self._report_status()
        if batch is None:
            return False
        self._clock.begin()
        self._pending.append((batch, self._pool.submit(batch)))
        return True

    def _write_one(self) -> bool:
        """Write the oldest batch, once it is encoded. Return False if no batch is in flight."""
        if not self._pending:
            return False
        batch, future = self._pending[0]
        # With fewer batches in flight than tokenizers, the writer waits for the source.
        cause = "tokenizing" if len(self._pending) >= self._pool.size else "reading"
        try:
            with self._clock.waiting_for(cause):
                encoded = future.result(_POLL_S)
        except NotYet:
            return True
        self._pending.popleft()
        self._write(batch, encoded)
        return True

    def _write(self, batch: TextBatch, encoded: EncodedBatch) -> None:
        last = LastBatch(**batch.position._asdict(), crc32=zlib.crc32(encoded.tokens.data))
        before = self._journal.last_batch
        if before is not None and batch.position == before.position:
            # After a resume, the last batch is read again only for this comparison; it is already written.
            if last != before:
                raise AsgoError(
                    f"{batch.file}: the text has changed since the shards were started; pass --overwrite to start again"
                )
            return
        self._writer.write(encoded, first_document=self.documents.read)
        self.documents += encoded.counts
        self._last = last
        is_due = time.monotonic() - self._saved_at >= _SECONDS_BETWEEN_JOURNALS
        if is_due or self._writer.finished_shards > self._saved_shards:
            self._save()

    def _save(self) -> None:
        journal = {"last_batch": self._last, "documents": self.documents, "writers": self._writer.checkpoint()}
        save_journal(self._folder, self._journal.model_copy(update=journal))
        self._saved_at = time.monotonic()
        self._saved_shards = self._writer.finished_shards
        self._report_status()

    def _report_status(self) -> None:
        writer, clock = self._writer, self._clock
        rate = clock.tokens_per_s(writer.tokens)
        self._report(
            Status(
                documents=self.documents.read,
                tokens=writer.tokens,
                tokens_wanted=writer.tokens_wanted,
                finished_shards=writer.finished_shards,
                tokens_per_s=rate,
                reading_share=clock.share("reading"),
                tokenizing_share=clock.share("tokenizing"),
                seconds_left=(writer.tokens_wanted - writer.tokens) / rate if rate else None,
            )
        )


class _Clock:
    """Measures rates and waiting times from the first batch on, without the startup."""

    def __init__(self, tokens: int) -> None:
        self._first_tokens = tokens
        self._began_at: float | None = None
        self._waited = {"reading": 0.0, "tokenizing": 0.0}

    def tokens_per_s(self, tokens: int) -> float:
        return (tokens - self._first_tokens) / self._elapsed

    def share(self, of: str) -> float:
        return self._waited[of] / self._elapsed

    def begin(self) -> None:
        """Start the clock, unless it is running."""
        if self._began_at is None:
            self._began_at = time.monotonic()

    @contextlib.contextmanager
    def waiting_for(self, what: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            if self._began_at is not None:
                self._waited[what] += time.monotonic() - began

    @property
    def _elapsed(self) -> float:
        return math.inf if self._began_at is None else max(1e-3, time.monotonic() - self._began_at)
