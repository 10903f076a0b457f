"""Speed of reading training batches, and random tokens to read."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np

from pipelines.data.batches import TrainingBatches, open_token_data
from pipelines.data.manifest import DocumentCounts, Manifest, shard_name, write_manifest
from pipelines.data.shards import ShardWriter
from pipelines.data.tokenizers import Gpt2Tokenizer, Tokenizer

_SEED = 0
_SHARDS = 3
_SHARD_TOKENS = 10_000_000


def measure_batches(folder: Path | None, context_length: int, batch_size: int, seconds: float) -> float:
    """Return the tokens per second that one thread reads into training batches, from a warm page cache.

    A token counts once, although it is an input and a target. `folder` is any folder of training data; None means a
    temporary one of random tokens, 60 MB. Raises `AsgoError` like `open_token_data` and `TrainingBatches`.
    """
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="asgo-bench-") as temporary:
            write_random_tokens(Path(temporary), Gpt2Tokenizer(), _SHARD_TOKENS, _SHARDS)
            return measure_batches(Path(temporary), context_length, batch_size, seconds)
    # Opening reads every token, which warms the page cache.
    batches = TrainingBatches(open_token_data(folder), context_length, batch_size, _SEED)
    batches.batch(0)  # makes the order of the first epoch
    steps, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        steps += 1
        batches.batch(steps)
    return steps * batch_size * context_length / elapsed


def write_random_tokens(folder: Path, tokenizer: Tokenizer, count: int, shards: int = 2) -> None:
    """Write one document, the same every time, as shards of `count` tokens; the first shard is the validation data."""
    tokens = np.random.default_rng(_SEED).integers(tokenizer.end_of_text, size=shards * count, dtype=np.uint16)
    tokens[0] = tokenizer.end_of_text
    with ShardWriter([folder / shard_name(index) for index in range(shards)], shard_tokens=count) as writer:
        writer.write(tokens, np.array([0]), np.array([0]))
        written = writer.finish()
    manifest = Manifest(
        source="random tokens",
        revision=str(_SEED),
        tokenizer=tokenizer.describe(),
        documents=DocumentCounts(read=1),
        shards=tuple(written),
    )
    write_manifest(folder, manifest)
