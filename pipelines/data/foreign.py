"""Read token files of other programs: shards of llm.c and modded-nanogpt, and nanoGPT's files without a header."""

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
_HEADERLESS = ("train.bin", "val.bin")  # nanoGPT's names
_PICKLED_TABLE = "meta.pkl"
# Pieces, so all cores share nanoGPT's single training file. The fingerprint depends on this size: do not change it.
_PIECE_BYTES = 1 << 28
_TOKENS_LOOKED_AT, _FEWEST_TOKENS = 1 << 16, 8
_BYTES_AT_ONCE = 1 << 20  # fits the CPU cache, so digest and maximum read memory once


@dataclass(frozen=True, eq=False)
class ForeignTokens:
    """GPT-2 tokens in the files of another program, and the digest of all of them."""

    train: tuple[TokenFile, ...]
    validation: tuple[TokenFile, ...]
    fingerprint: str


def open_foreign_tokens(folder: Path) -> ForeignTokens:
    """Open a folder without a manifest; its tokens are taken for GPT-2's.

    The last word "val" or "train" in the name of a `.bin` file says which part it belongs to; other files are ignored.
    Shards are in the natural order of their names. All files are read once, by all cores, to find tokens beyond the
    vocabulary and to compute the fingerprint, a digest of all tokens that does not depend on the names.

    Raises `AsgoError` if one part has no file, and for a file that is damaged or holds other tokens.
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
    """Return the files of a part, "train" or "val", in natural order: 2 before 10."""
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
    # Whole words: "train_retrieval_000001" is a training file.
    words = re.findall(r"(?<![A-Za-z])(train|val)(?![A-Za-z])", stem)
    return words[-1] if words else None


def _first_token_at(path: Path) -> int:
    """Return the byte offset of the first token. Raises `AsgoError` if this is not a whole file of 16-bit tokens."""
    with path.open("rb") as file:
        magic = int.from_bytes(file.read(4), "little")
    if magic == _LLAMA_3_MAGIC:
        raise AsgoError(f"{path}: 32-bit Llama 3 tokens of llm.c; only shards of GPT-2 tokens can be read")
    # Unambiguous: the first 16 bits of either magic number are not a GPT-2 token.
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
            f"{path}: its vocabulary is in {_PICKLED_TABLE}, and pickles are not loaded, because they may run code; "
            "make the folder from its text with `asgo data shakespeare` or `asgo data text --tokenizer chars`"
        )
    size = path.stat().st_size
    if size % 2 or not size:
        raise _bad(path, f"{size:,} bytes are not a whole number of 16-bit tokens" if size else "it is empty")
    # In wider tokens, every second 16-bit value is an upper half: 0, or 1 in a vocabulary of 100,000. In 16-bit text it
    # is any token, and tokens 0 to 3 are rare.
    upper_halves = np.fromfile(path, dtype="<u2", count=_TOKENS_LOOKED_AT)[1::2]
    if len(upper_halves) >= _FEWEST_TOKENS and upper_halves.max() < 4:
        raise AsgoError(
            f"{path}: probably 32-bit or 64-bit tokens, and only 16-bit ones can be read; convert them with "
            "numpy's .astype(np.uint16), or make the folder from its text with `asgo data text`"
        )


def _checked_digests(offsets: dict[Path, int]) -> dict[Path, list[str]]:
    """Return the SHA-256 of each piece of each file. Tokens start at the given offsets.

    Raises `AsgoError` for a token beyond the vocabulary.
    """
    sizes = {path: path.stat().st_size for path in offsets}
    pieces = [(path, start) for path in offsets for start in range(offsets[path], sizes[path], _PIECE_BYTES)]
    digests: dict[Path, list[str]] = {path: [] for path in offsets}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (path, _), digest in zip(pieces, pool.map(_checked_digest, *zip(*pieces, strict=True)), strict=True):
            digests[path].append(digest)
    return digests


def _checked_digest(path: Path, start: int) -> str:
    """Return the digest of one piece, in one pass; most of it runs without the GIL."""
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
    return AsgoError(f"{path}: {problem}; copy this file again, or remove it from the folder")
