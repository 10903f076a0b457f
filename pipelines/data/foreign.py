"""Token files that other programs made: shards of llm.c and modded-nanogpt, and nanoGPT's files without a header."""

from __future__ import annotations

import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.data.manifest import MANIFEST
from pipelines.data.shards import HEADER_BYTES, MAGIC, TokenFile, allow_open_files, header_problem, vocabulary_problem
from pipelines.data.tokenizers import Gpt2Tokenizer
from pipelines.errors import AsgoError

_LLAMA_3_MAGIC = 20240801
_HEADERLESS = ("train.bin", "val.bin")  # what nanoGPT writes
_PICKLED_TABLE = "meta.pkl"
_PIECE_BYTES = 1 << 28  # nanoGPT's only training file would keep one core busy; the fingerprint depends on it
_TOKENS_LOOKED_AT, _FEWEST_TOKENS = 1 << 16, 8
_BYTES_AT_ONCE = 1 << 20  # stays in a core's cache between the digest and the maximum


@dataclass(frozen=True, eq=False)
class ForeignTokens:
    """GPT-2 tokens in the files of another program, and a digest of them all."""

    train: tuple[TokenFile, ...]
    validation: tuple[TokenFile, ...]
    fingerprint: str


def open_foreign_tokens(folder: Path) -> ForeignTokens:
    """Open a folder without a manifest, taking its tokens for GPT-2's.

    A `.bin` file validates or trains as the last word "val" or "train" in its name says; others are left alone. Shards
    follow each other in the natural order of their names. All files are read through once, by all cores, to find tokens
    beyond the vocabulary and for the fingerprint, a digest of all tokens that does not depend on the names.

    Raises `AsgoError` when there is no file of a kind, and for one that is damaged or holds other tokens.
    """
    train, validation = (_files(folder, part) for part in ("train", "val"))
    offsets = {path: _first_token_at(path) for path in (*train, *validation)}
    digests = _checked_digests(offsets)
    allow_open_files(len(offsets))
    content = [Gpt2Tokenizer.name, *([digests[path] for path in part] for part in (validation, train))]
    return ForeignTokens(
        train=tuple(TokenFile(path, offsets[path]) for path in train),
        validation=tuple(TokenFile(path, offsets[path]) for path in validation),
        fingerprint=hashlib.sha256(json.dumps(content).encode()).hexdigest(),
    )


def _files(folder: Path, part: str) -> list[Path]:
    """The files of a part, "train" or "val", in natural order: 2 comes before 10."""
    paths = [path for path in folder.glob("*.bin") if _part_of(path.stem) == part]
    if not paths:
        raise AsgoError(
            f'{folder}: no {MANIFEST} as `asgo data` writes it, and no .bin file with the word "{part}" in its name, '
            f"such as fineweb_{part}_000001.bin or {part}.bin"
        )
    return sorted(paths, key=_natural_order)


def _natural_order(path: Path) -> tuple[list[int | str], str]:
    parts = re.split(r"(\d+)", path.name)
    return [int(part) if part.isdecimal() else part for part in parts], path.name  # "2" and "02" are equal numbers


def _part_of(stem: str) -> str | None:
    # Whole words: "train_retrieval_000001" does not validate.
    words = re.findall(r"(?<![A-Za-z])(train|val)(?![A-Za-z])", stem)
    return words[-1] if words else None


def _first_token_at(path: Path) -> int:
    """The byte where the tokens of a file begin. Raises `AsgoError` if this is not a whole file of 16-bit tokens."""
    with path.open("rb") as file:
        magic = int.from_bytes(file.read(4), "little")
    if magic == _LLAMA_3_MAGIC:
        raise AsgoError(f"{path}: llm.c's tokens of Llama 3, 32 bits each; only shards of GPT-2 tokens can be read")
    # No mistake is possible: the first half of either magic number is no token of GPT-2.
    if path.name in _HEADERLESS and magic != MAGIC:
        _require_headerless_gpt2(path)
        return 0
    problem = header_problem(path)
    if problem is not None:
        raise _bad(path, problem)
    return HEADER_BYTES


def _require_headerless_gpt2(path: Path) -> None:
    if path.with_name(_PICKLED_TABLE).exists():
        raise AsgoError(
            f"{path}: the table of its tokens is in {_PICKLED_TABLE}, and pickles are not loaded, as they may run "
            "code; make the folder from its text by `asgo data shakespeare` or `asgo data text --tokenizer chars`"
        )
    size = path.stat().st_size
    if size % 2 or not size:
        raise _bad(path, f"{size:,} bytes are not a whole number of 16-bit tokens" if size else "it is empty")
    # Of wider tokens the upper halves are 0, or 1 in a vocabulary of 100,000. Of 16-bit tokens every second one is not
    # one of the four rarest signs.
    upper_halves = np.fromfile(path, dtype="<u2", count=_TOKENS_LOOKED_AT)[1::2]
    if len(upper_halves) >= _FEWEST_TOKENS and upper_halves.max() < 4:
        raise AsgoError(
            f"{path}: tokens of 32 or 64 bits, as it seems, and only 16-bit ones can be read; write them anew with "
            "numpy's .astype(np.uint16), or make the folder from its text by `asgo data text`"
        )


def _checked_digests(offsets: dict[Path, int]) -> dict[Path, list[str]]:
    """SHA-256 of each piece of the files, whose tokens begin at these bytes and are all in the vocabulary."""
    sizes = {path: path.stat().st_size for path in offsets}
    pieces = [(path, start) for path in offsets for start in range(offsets[path], sizes[path], _PIECE_BYTES)]
    digests: dict[Path, list[str]] = {path: [] for path in offsets}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (path, _), digest in zip(pieces, pool.map(_checked_digest, *zip(*pieces, strict=True)), strict=True):
            digests[path].append(digest)
    return digests


def _checked_digest(path: Path, start: int) -> str:
    """The digest of one piece, in one pass, most of it without the interpreter's lock."""
    buffer = memoryview(bytearray(_BYTES_AT_ONCE))
    digest, largest, left = hashlib.sha256(), 0, _PIECE_BYTES
    with path.open("rb") as file:
        file.seek(start)
        while count := file.readinto(buffer[:left]):
            digest.update(buffer[:count])
            largest = max(largest, int(np.frombuffer(buffer[:count], dtype="<u2").max()))
            left -= count
    problem = vocabulary_problem(largest, Gpt2Tokenizer.vocab_size)
    if problem is not None:
        raise _bad(path, f"{problem} of GPT-2")
    return digest.hexdigest()


def _bad(path: Path, problem: str) -> AsgoError:
    return AsgoError(f"{path}: {problem}; copy this file again, or take it out of the folder")
