"""Describe a data folder; reads only what is shown."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.data.manifest import Manifest, load_manifest
from pipelines.data.shards import HEADER_BYTES
from pipelines.data.tokenizers import Tokenizer, Tokens, build_tokenizer
from pipelines.errors import AsgoError

CHARACTERS = 400
"""Maximum number of characters decoded of a document."""

_TOKENS_LOOKED_THROUGH = 1 << 20  # searched for the first documents of a shard: 2 MB, whatever the shard's size


@dataclass(frozen=True)
class FolderInfo:
    """Summary of a data folder.

    `sizes` are the bytes of each shard file; None for a missing one. `training` and `validation` are the beginnings of
    documents as text, including control characters.
    """

    manifest: Manifest
    vocab_size: int
    sizes: tuple[int | None, ...]
    training: tuple[str, ...]
    validation: tuple[str, ...]


def describe(folder: Path, lines: int) -> FolderInfo:
    """Describe `folder`, with the beginnings of `lines` training documents and of one validation document.

    Trusts the manifest; `verify` checks the shards. Raises as `load_manifest` does, and `AsgoError` for a token outside
    the vocabulary.
    """
    manifest = load_manifest(folder)
    tokenizer = build_tokenizer(manifest.tokenizer)
    validation, training, *_ = (folder / shard.file for shard in manifest.shards)
    return FolderInfo(
        manifest=manifest,
        vocab_size=tokenizer.vocab_size,
        sizes=tuple(_size(folder / shard.file) for shard in manifest.shards),
        training=_beginnings(training, tokenizer, lines),
        validation=_beginnings(validation, tokenizer, min(lines, 1)),
    )


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _beginnings(path: Path, tokenizer: Tokenizer, documents: int) -> tuple[str, ...]:
    """Return the beginnings of a shard's first documents; of a shard inside one document, its own beginning."""
    if not path.exists():
        return ()
    tokens: Tokens = np.fromfile(path, dtype="<u2", count=_TOKENS_LOOKED_THROUGH, offset=HEADER_BYTES)
    ends: NDArray[np.int64] = np.append(np.flatnonzero(tokens == tokenizer.end_of_text), len(tokens))
    starts = ends[:-1] + 1 if len(ends) > 1 else np.zeros(1, dtype=np.int64)
    stops = ends[-len(starts) :]
    # A character has at most four bytes and a token at least one: this many tokens are enough.
    places = [(start, min(stop, start + 4 * CHARACTERS)) for start, stop in zip(starts, stops, strict=True)]
    pieces = [tokens[start:stop].tolist() for start, stop in places if start < stop]
    try:
        return tuple(tokenizer.decode(piece)[:CHARACTERS] for piece in pieces[:documents])
    except ValueError as error:
        raise AsgoError(f"{path}: damaged: {error}; copy it again, or make the folder again") from None
