"""Speed from text to token shards, compared with the process pool of public scripts."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from pyarrow import parquet

from pipelines.benchmarks.batches import measure_batches
from pipelines.benchmarks.turns import Contestant, Progress, in_turns
from pipelines.data.corpus.corpus_to_shards import CorpusOptions, prepare_corpus
from pipelines.data.corpus.encode import Backend, best_backend
from pipelines.data.corpus.pipeline import Status
from pipelines.data.corpus.sources import FINEWEB, ROWS_IN_BATCH
from pipelines.data.documents import find_files, read_documents
from pipelines.data.shards import HEADER_BYTES
from pipelines.data.tokenizers import Gpt2Tokenizer, gpt2_encoding
from pipelines.errors import AsgoError

POOL = "multiprocessing.Pool"
H100_TOKENS_PER_S = 500_000
"""Tokens per second of one H100 that trains GPT-2 124 M."""
CONTEXT_LENGTH, BATCH_SIZE = 1024, 32

_DOCUMENT_CHARACTERS = 4800  # the mean of FineWeb-Edu
_BATCHES_S = 3.0
_ENOUGH_SHARDS = 10_000  # more than the source fills
_POOL_CHUNK = 16


@dataclass
class Tokenizing(Contestant):
    """One way to tokenize: tokens per second in each round, number of tokens, and their digest."""

    tokens: int = 0
    digest: str = ""


@dataclass(frozen=True)
class CorpusReport:
    """Results; the first contestant is the pool. `batches_per_s` is in tokens per second."""

    workers: int
    documents: int
    bytes: int
    contestants: tuple[Tokenizing, ...]
    batches_per_s: float
    h100_tokens_per_s: int = H100_TOKENS_PER_S

    @property
    def same_tokens(self) -> bool:
        """Whether all contestants produced the same tokens."""
        return len({contestant.digest for contestant in self.contestants}) == 1

    def as_json(self) -> dict[str, Any]:
        """Return the report as plain values for JSON."""
        return {
            "workers": self.workers,
            "documents": self.documents,
            "bytes": self.bytes,
            "same_tokens": self.same_tokens,
            "tokenizing": [
                {
                    "name": contestant.name,
                    "tokens": contestant.tokens,
                    "tokens_per_s": contestant.rates,
                    "speedup": contestant.speedup(self.contestants[0]),
                }
                for contestant in self.contestants
            ],
            "batches_tokens_per_s": self.batches_per_s,
            "h100_tokens_per_s": self.h100_tokens_per_s,
        }


def bench_corpus(inputs: Sequence[Path], workers: int | None, repeats: int, progress: Progress) -> CorpusReport:
    """Measure the speed from a Parquet file to tokens on disk, in turns, `repeats` rounds.

    `inputs` are files or folders of text; without them, the sources of Python's standard library. Time starts with the
    first written tokens, which excludes startup. Calls `progress(what, turns done, turns)`.
    """
    workers = workers or os.cpu_count() or 1
    contestants = [Tokenizing(POOL), *(Tokenizing(f"asgo, {backend}") for backend in _backends())]
    with tempfile.TemporaryDirectory(prefix="asgo-bench-") as folder:
        source = Path(folder, "text", "documents.parquet")
        documents, size = _write_documents(inputs, source)
        ways = {
            each.name: partial(_take_turn, each, source, Path(folder, "out"), workers, max(1, size // 16))
            for each in contestants
        }
        for contestant, rates in zip(contestants, in_turns(ways, repeats, progress, 1).values(), strict=True):
            contestant.rates = rates
        turns = repeats * len(ways)
        progress("batches", turns, turns + 1)
        batches_per_s = measure_batches(None, CONTEXT_LENGTH, BATCH_SIZE, _BATCHES_S)
    return CorpusReport(workers, documents, size, tuple(contestants), batches_per_s)


def _backends() -> list[Backend]:
    return ["tiktoken", "gigatoken"] if best_backend() == "gigatoken" else ["tiktoken"]


def _write_documents(inputs: Sequence[Path], path: Path) -> tuple[int, int]:
    """Write the text as a Parquet file like those of the hub; return the numbers of documents and bytes."""
    documents = map("".join, read_documents(find_files(inputs))) if inputs else _library()
    texts = [text for text in documents if text.strip()]
    path.parent.mkdir()
    parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=4 * ROWS_IN_BATCH)
    return len(texts), sum(len(text.encode()) for text in texts)


def _library() -> Iterator[str]:
    """Yield the sources of the standard library, which every machine has, cut into documents of typical length."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        for start in range(0, len(text), _DOCUMENT_CHARACTERS):
            yield text[start : start + _DOCUMENT_CHARACTERS]


def _take_turn(contestant: Tokenizing, source: Path, out: Path, workers: int, shard_tokens: int) -> float:
    """Tokenize `source` once and return the rate. Hash the files in `out`, then remove them."""
    if contestant.name == POOL:
        rate = _run_pool(source, out, workers)
    else:
        backend: Backend = "gigatoken" if contestant.name.endswith("gigatoken") else "tiktoken"
        rate = _run_asgo(source.parent, out, workers, shard_tokens, backend)
    digest, tokens = hashlib.sha256(), 0
    for shard in sorted(out.glob("*.bin")):
        content = np.fromfile(shard, dtype=np.uint16, offset=HEADER_BYTES)
        digest.update(content.data)
        tokens += len(content)
    shutil.rmtree(out)
    contestant.tokens, contestant.digest = tokens, digest.hexdigest()
    return rate


def _run_asgo(source: Path, out: Path, workers: int, shard_tokens: int, backend: Backend) -> float:
    moments: list[tuple[float, int]] = []

    def note(status: Status) -> None:
        if status.tokens and (not moments or status.tokens > moments[-1][1]):
            moments.append((time.perf_counter(), status.tokens))

    options = CorpusOptions(
        shards=_ENOUGH_SHARDS, shard_tokens=shard_tokens, source=str(source), workers=workers, backend=backend
    )
    prepare_corpus(FINEWEB, out, options, report=note, notify=lambda line: None)
    return _rate(moments)


def _run_pool(source: Path, out: Path, workers: int) -> float:
    """Tokenize like public scripts: one document per call, returned as a list of integers; one array to disk."""
    moments: list[tuple[float, int]] = []
    tokens = np.empty(source.stat().st_size * 8, dtype=np.uint16)  # unwritten pages take no memory
    count = 0
    with multiprocessing.get_context("spawn").Pool(workers, initializer=_encode_list, initargs=("",)) as pool:
        for encoded in pool.imap(_encode_list, _documents(source), chunksize=_POOL_CHUNK):
            tokens[count : count + len(encoded)] = encoded
            count += len(encoded)
            moments.append((time.perf_counter(), count))
    out.mkdir()
    with (out / "tokens.bin").open("wb") as file:
        file.write(bytes(HEADER_BYTES))
        file.write(tokens[:count].data)
    moments.append((time.perf_counter(), count))
    return _rate(moments)


def _documents(source: Path) -> Iterator[str]:
    with parquet.ParquetFile(source) as table:
        for batch in table.iter_batches(ROWS_IN_BATCH, columns=["text"]):
            yield from batch.column(0).to_pylist()


def _encode_list(text: str) -> list[int]:
    return [Gpt2Tokenizer.end_of_text, *gpt2_encoding().encode_ordinary(text)]


def _rate(moments: Sequence[tuple[float, int]]) -> float:
    """Return the tokens per second between the first and the last of the moments (seconds, tokens so far)."""
    (began, first), (ended, last) = moments[0], moments[-1]
    if last < 2 * first:
        raise AsgoError("too little text to measure; give more text")
    return (last - first) / (ended - began)
