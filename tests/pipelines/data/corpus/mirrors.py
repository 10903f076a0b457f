"""A small mirror of a corpus on the disk, and what its shards must be by the plainest of means."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow
from pyarrow import parquet

from pipelines.data.corpus.corpus_to_shards import CorpusOptions, prepare_corpus
from pipelines.data.corpus.pipeline import Status
from pipelines.data.corpus.sources import Corpus
from pipelines.data.manifest import Manifest
from pipelines.data.tokenizers import Gpt2Tokenizer

WORDS = ("token", "shard", "stream", " ", "\n", "the", "of", "Größe", "世界", "optimizer", "0.05", "<|endoftext|>")


def make_texts(seed: int, count: int) -> list[str]:
    """Documents of very different lengths, some of them blank."""
    rng = random.Random(seed)
    sizes = [rng.choice((0, 1, 5, 40, 300)) for _ in range(count)]
    return [" ".join(rng.choices(WORDS, k=size)) for size in sizes]


def write_mirror(folder: Path, files: Sequence[Sequence[str]], suffix: str) -> Path:
    """A folder with a file for each list of texts."""
    folder.mkdir(parents=True)
    for number, texts in enumerate(files):
        path = folder / f"{number:03d}.{suffix}"
        if suffix == "parquet":
            table = pyarrow.table({"text": texts, "id": [str(n) for n in range(len(texts))]})
            parquet.write_table(table, path, row_group_size=301)
        else:
            path.write_text("".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(texts)))
    return folder


def expected_shards(
    texts: Sequence[str], shards: int, shard_tokens: int, validate_every: int | None
) -> list[list[int]]:
    """The tokens of shard 0, 1, ... by one loop over the documents and nothing else."""
    tokenizer = Gpt2Tokenizer()
    validation: list[int] = []
    training: list[int] = []
    wanted = shards * shard_tokens
    for number, text in enumerate(texts):
        if not text.strip():
            continue
        tokens = [50256, *tokenizer.encode(text).tolist()]
        if validate_every is None:
            room = shard_tokens - len(validation)
            validation += tokens[:room]
            training += tokens[room:]
        elif number % validate_every == 0:
            validation += tokens
        else:
            training += tokens
        if len(training) >= wanted:
            break
    training = training[:wanted]
    return [validation] + [training[start : start + shard_tokens] for start in range(0, len(training), shard_tokens)]


def shards_in(folder: Path) -> list[list[int]]:
    return [np.fromfile(path, dtype="<u2", offset=1024).tolist() for path in sorted(folder.glob("shard_*.bin"))]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@dataclass
class Preparation:
    """Calls `prepare_corpus` and keeps what it says."""

    corpus: Corpus
    options: CorpusOptions
    statuses: list[Status] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    report: Callable[[Status], None] | None = None

    def run(self, out: Path, overwrite: bool = False) -> Manifest:
        return prepare_corpus(
            self.corpus,
            out,
            self.options,
            overwrite=overwrite,
            report=self.report or self.statuses.append,
            notify=self.notes.append,
        )
