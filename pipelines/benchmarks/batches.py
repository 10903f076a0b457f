"""How fast training batches are read."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np

from pipelines.data.batches import TrainingBatches, open_token_data
from pipelines.data.manifest import DocumentCounts, Manifest, shard_name, write_manifest
from pipelines.data.shards import ShardWriter
from pipelines.data.tokenizers import Gpt2Tokenizer

_SEED = 0
_SHARDS = 3
_SHARD_TOKENS = 10_000_000


def measure_batches(folder: Path | None, context_length: int, batch_size: int, seconds: float) -> float:
    """Tokens a second that one thread reads into the batches of a training run, from a warm page cache.

    A token counts once, though it is an input and a target. `folder` is any folder that can be trained on; None
    stands for one of made-up tokens, 60 MB, that is there only for this long. Raises `AsgoError` as `open_token_data`
    and `TrainingBatches` do.
    """
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="asgo-bench-") as temporary:
            _write_made_up_tokens(Path(temporary))
            return measure_batches(Path(temporary), context_length, batch_size, seconds)
    # Opening looks at every token, and so brings all of them into the cache.
    batches = TrainingBatches(open_token_data(folder), context_length, batch_size, _SEED)
    batches.batch(0)  # makes the order of the first epoch
    steps, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        steps += 1
        batches.batch(steps)
    return steps * batch_size * context_length / elapsed


def _write_made_up_tokens(folder: Path) -> None:
    """One document of random tokens, always the same, in shards as `asgo data` writes them."""
    count = _SHARDS * _SHARD_TOKENS
    tokens = np.random.default_rng(_SEED).integers(Gpt2Tokenizer.end_of_text, size=count, dtype=np.uint16)
    tokens[0] = Gpt2Tokenizer.end_of_text
    with ShardWriter([folder / shard_name(index) for index in range(_SHARDS)], shard_tokens=_SHARD_TOKENS) as writer:
        writer.write(tokens, np.array([0]), np.array([0]))
        shards = writer.finish()
    manifest = Manifest(
        source="made-up tokens",
        revision=str(_SEED),
        tokenizer={"name": Gpt2Tokenizer.name},
        documents=DocumentCounts(read=1),
        shards=tuple(shards),
    )
    write_manifest(folder, manifest)
