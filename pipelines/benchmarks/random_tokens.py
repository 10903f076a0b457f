"""A folder of random tokens that a run can train on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipelines.data.manifest import DocumentCounts, Manifest, shard_name, write_manifest
from pipelines.data.shards import ShardWriter
from pipelines.data.tokenizers import Tokenizer

_SEED = 0


def write_random_tokens(folder: Path, tokenizer: Tokenizer, count: int) -> None:
    """Write a validation and a training shard of `count` tokens each, always the same, as `asgo data` does."""
    tokens = np.random.default_rng(_SEED).integers(tokenizer.end_of_text, size=2 * count, dtype=np.uint16)
    tokens[0] = tokenizer.end_of_text
    with ShardWriter([folder / shard_name(index) for index in range(2)], shard_tokens=count) as writer:
        writer.write(tokens, np.array([0]), np.array([0]))
        shards = writer.finish()
    manifest = Manifest(
        source="random tokens",
        revision=str(_SEED),
        tokenizer=tokenizer.describe(),
        documents=DocumentCounts(read=1),
        shards=tuple(shards),
    )
    write_manifest(folder, manifest)
