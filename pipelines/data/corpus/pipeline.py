"""Batches from the reader to the tokenizers to the shards, with a bounded number of them on the way."""

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
_BYTES_ON_THE_WAY = 128 << 20


@dataclass(frozen=True)
class Status:
    """How far a preparation is. `tokens` of `tokens_wanted` include earlier sessions, as do `documents` and `shards`.

    `tokens_per_s` is this session's rate; `reading_share` and `tokenizing_share` are the shares of its time in which
    there was nothing to write because of the one or of the other; `seconds_left` is unknown at first.
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
    """Hands batches to the tokenizers and writes what they give, in the order of the source."""

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
        """Go on until the training shards are full or the source ends. Raises as `prepare_corpus` says."""
        try:
            while not self._writer.is_full:
                if stop:
                    raise RunInterrupted(f"{stop.signal_name}: {self._kept()}")
                if not self._submit_one() and not self._write_one() and self._feed.ended:
                    break
        except BrokenExecutor:
            self._save()
            if stop:  # it was sent to all processes, as some schedulers do
                raise RunInterrupted(f"{stop.signal_name}: {self._kept()}") from None
            raise AsgoError(
                f"a tokenizer process was lost (killed, perhaps for want of memory; fewer --workers need less): "
                f"{self._kept()}"
            ) from None
        except AsgoError:
            self._save()
            raise
        self._save()

    def _kept(self) -> str:
        return f"{self._writer.tokens:,} of {self._writer.tokens_wanted:,} tokens are written; the same command goes on"

    def _submit_one(self) -> bool:
        """Hand a batch to the tokenizers if there is one and room for it."""
        on_the_way = sum(len(batch.column) for batch, _ in self._pending)
        if len(self._pending) >= self._window or on_the_way >= _BYTES_ON_THE_WAY or self._feed.ended:
            return False
        with self._clock.waiting_for("reading"):
            batch = self._feed.poll(0 if self._pending else _POLL_S)
        self._tell()
        if batch is None:
            return False
        self._clock.begin()
        self._pending.append((batch, self._pool.submit(batch)))
        return True

    def _write_one(self) -> bool:
        """Write the oldest batch. False when there is none on the way."""
        if not self._pending:
            return False
        batch, future = self._pending[0]
        # With fewer batches on the way than tokenizers, it is the source that keeps the writer waiting.
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
            if last != before:  # it is read again for this comparison, and is written already
                raise AsgoError(f"{batch.file}: not the text that the shards were begun with; pass --overwrite")
            return
        self._writer.write(encoded, first_document=self.documents.read)
        self.documents += encoded.counts
        self._last = last
        a_while = time.monotonic() - self._saved_at >= _SECONDS_BETWEEN_JOURNALS
        if a_while or self._writer.finished_shards > self._saved_shards:
            self._save()

    def _save(self) -> None:
        journal = {"last_batch": self._last, "documents": self.documents, "writers": self._writer.checkpoint()}
        save_journal(self._folder, self._journal.model_copy(update=journal))
        self._saved_at = time.monotonic()
        self._saved_shards = self._writer.finished_shards
        self._tell()

    def _tell(self) -> None:
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
    """Where the time goes, counted from the first batch on: what comes before it is starting up."""

    def __init__(self, tokens: int) -> None:
        self._first_tokens = tokens
        self._began_at: float | None = None
        self._waited = {"reading": 0.0, "tokenizing": 0.0}

    def tokens_per_s(self, tokens: int) -> float:
        return (tokens - self._first_tokens) / self._elapsed

    def share(self, of: str) -> float:
        return self._waited[of] / self._elapsed

    def begin(self) -> None:
        """Start counting, unless it has begun."""
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
