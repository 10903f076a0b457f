"""Verify that a data folder still holds what was written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipelines.data.manifest import ShardEntry, load_manifest
from pipelines.data.progress import Tally, in_threads
from pipelines.data.shards import HEADER_BYTES, MAGIC, VERSION, shard_problem
from pipelines.data.tokenizers import build_tokenizer

Progress = Callable[[int, int], None]
"""Called as (bytes checked, bytes in total)."""

_BYTES_AT_ONCE = 1 << 20  # fits the CPU cache, so digest and maximum read memory once


@dataclass(frozen=True)
class ShardResult:
    """One shard file, with the counts of the manifest and what is wrong with it, or None."""

    file: str
    tokens: int
    documents: int
    problem: str | None


def verify(folder: Path, progress: Progress | None = None) -> list[ShardResult]:
    """Check each shard of `folder` against the manifest: presence, header, size, largest token, digest.

    Reads each shard once, several in parallel; results are in the manifest's order. After them come other problems:
    files that look like shards and are not in the manifest, and hidden files of an interrupted writer. Raises
    `AsgoError` if the folder is unfinished or the manifest is missing or altered, `UsageError` if the folder does not
    exist.
    """
    manifest = load_manifest(folder)
    vocab_size = build_tokenizer(manifest.tokenizer).vocab_size
    tally, reported = Tally(), 0
    results: dict[str, ShardResult] = {}

    def check(shard: ShardEntry) -> None:
        problem = _problem(folder, shard, vocab_size, tally)
        results[shard.file] = ShardResult(shard.file, shard.tokens, shard.documents, problem)

    def report(done: int) -> None:
        nonlocal reported
        if progress is not None and done > reported:
            reported = done
            progress(done, sum(_file_bytes(shard) for shard in manifest.shards))

    workers = min(os.cpu_count() or 1, len(manifest.shards))
    in_threads([partial(check, shard) for shard in manifest.shards], workers, tally, report)
    return [results[shard.file] for shard in manifest.shards] + _foreign(folder, results)


class _Content(NamedTuple):
    header: bytes
    sha256: str
    largest_token: int


def _file_bytes(shard: ShardEntry) -> int:
    return HEADER_BYTES + 2 * shard.tokens


def _problem(folder: Path, shard: ShardEntry, vocab_size: int, tally: Tally) -> str | None:
    path = folder / shard.file
    try:
        # A file of the wrong size is not read: its header is enough to name the problem.
        right_size = path.stat().st_size == _file_bytes(shard)
        if right_size and _is_sound(_read(path, tally), shard, vocab_size):
            return None
        return shard_problem(path, vocab_size) or _difference(path, shard)
    except FileNotFoundError:
        return "missing"
    except OSError as error:  # a bad sector or a missing permission: a result, so the other shards are still checked
        return f"cannot be read: {error.strerror}"


def _read(path: Path, tally: Tally) -> _Content:
    """Return header, digest and largest token of a shard, in one pass over its bytes."""
    buffer = memoryview(bytearray(_BYTES_AT_ONCE))
    largest = 0
    with path.open("rb") as file:
        header = file.read(HEADER_BYTES)
        digest = hashlib.sha256(header)
        tally.advance(len(header))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            tokens = np.frombuffer(buffer[: count // 2 * 2], dtype="<u2")
            largest = max(largest, int(tokens.max(initial=0)))
            tally.advance(count)
    return _Content(header, digest.hexdigest(), largest)


def _is_sound(content: _Content, shard: ShardEntry, vocab_size: int) -> bool:
    # The digest proves that the bytes are unchanged; the other checks prove that they were valid when written.
    return (
        content.sha256 == shard.sha256
        and np.frombuffer(content.header, dtype="<i4")[:3].tolist() == [MAGIC, VERSION, shard.tokens]
        and content.largest_token < vocab_size
    )


def _difference(path: Path, shard: ShardEntry) -> str:
    """Return how a valid shard differs from the one in the manifest."""
    tokens = (path.stat().st_size - HEADER_BYTES) // 2
    if tokens != shard.tokens:
        return f"another shard: {tokens:,} tokens"
    return "altered: its SHA-256 is not the one in the manifest"


def _foreign(folder: Path, known: Collection[str]) -> list[ShardResult]:
    unknown = sorted(path.name for path in folder.glob("*.bin") if path.name not in known)
    remains = sorted(path.name for path in folder.glob(".*.bin.partial"))
    return [
        *(ShardResult(name, 0, 0, "not in the manifest") for name in unknown),
        *(ShardResult(name, 0, 0, "left by an interrupted run; remove it") for name in remains),
    ]
