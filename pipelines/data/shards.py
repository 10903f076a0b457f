"""Token shards: 256 little-endian int32 (20240520, 1, token count, zeros), then uint16 tokens.

The format that llm.c, modded-nanogpt and dion read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from pipelines.data.manifest import ShardEntry, SourcePosition
from pipelines.data.tokenizers import Tokens
from pipelines.errors import AsgoError
from pipelines.storage import naming, sha256_of

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
MAX_SHARD_TOKENS = 2**31 - 1  # the count is a signed 32-bit integer
_TOKEN = np.dtype("<u2")
_TOKENS_AT_ONCE = 1 << 24


class ShardWriter:
    """Streams documents into shard files of exactly `shard_tokens` tokens; the last one may be shorter.

    A document that does not fit goes on in the next file. `files` gives the paths in order; when they run out,
    `AsgoError` is raised. Leaving the context without `finish` abandons the shard that is being written.
    """

    def __init__(self, files: Iterable[Path], *, shard_tokens: int) -> None:
        self._files = iter(files)
        self._shard_tokens = shard_tokens
        self._shard: _OpenShard | None = None
        self._entries: list[ShardEntry] = []
        self._end = SourcePosition(document=0, token=0)

    def write(self, tokens: Tokens, document: int) -> None:
        """Append a document's tokens, end-of-text first; `document` is its number in the source."""
        written = 0
        while written < len(tokens):
            shard = self._shard = self._shard or self._open()
            shard.documents += written == 0
            part = tokens[written : written + shard.room]
            shard.append(part)
            written += len(part)
            done = written == len(tokens)
            self._end = SourcePosition(document=document + done, token=0 if done else written)
            if not shard.room:
                self._close(shard)

    def finish(self) -> list[ShardEntry]:
        """Complete the last shard and return one entry for each file."""
        if self._shard is not None:
            self._close(self._shard)
        return self._entries

    def _open(self) -> _OpenShard:
        path = next(self._files, None)
        if path is None:
            raise AsgoError(f"more than {self._shard_tokens:,} tokens do not fit in one validation shard")
        return _OpenShard(path, self._shard_tokens)

    def _close(self, shard: _OpenShard) -> None:
        self._entries.append(shard.finish(self._end))
        self._shard = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._shard is not None:
            self._shard.abandon()


class _OpenShard:
    """One shard file under a hidden name until it is complete."""

    def __init__(self, path: Path, capacity: int) -> None:
        self.path = path
        self.documents = 0
        self._tokens = 0
        self._capacity = capacity
        self._staged = path.with_name(f".{path.name}.partial")
        self._file = self._staged.open("wb")
        # The header of a full shard: the running digest is then right for every shard but a shorter last one.
        self._digest = hashlib.sha256()
        self._put(_header(capacity))

    @property
    def room(self) -> int:
        return self._capacity - self._tokens

    def append(self, tokens: Tokens) -> None:
        self._put(tokens.astype(_TOKEN, copy=False).tobytes())
        self._tokens += len(tokens)

    def finish(self, next_start: SourcePosition) -> ShardEntry:
        with naming(self.path), self._file:
            if self.room:
                self._file.seek(0)
                self._file.write(_header(self._tokens))
            self._file.flush()
            os.fsync(self._file.fileno())
        digest = sha256_of(self._staged) if self.room else self._digest.hexdigest()
        self._staged.rename(self.path)
        return ShardEntry(
            file=self.path.name,
            sha256=digest,
            tokens=self._tokens,
            documents=self.documents,
            next_start=next_start,
        )

    def abandon(self) -> None:
        with contextlib.suppress(OSError):  # closing flushes, which fails again on a full disk
            self._file.close()
        self._staged.unlink(missing_ok=True)

    def _put(self, content: bytes) -> None:
        with naming(self.path):
            self._file.write(content)
        self._digest.update(content)


def open_shard(path: Path, vocab_size: int) -> np.memmap[tuple[int], np.dtype[np.uint16]]:
    """The tokens of a shard, mapped from disk, shape (tokens,).

    Raises `AsgoError` for a wrong magic number, version or size and for a token beyond the vocabulary.
    """
    problem = shard_problem(path, vocab_size)
    if problem is not None:
        raise AsgoError(f"{path}: {problem}; make the folder again, or copy this file again")
    return _tokens_of(path)


def shard_problem(path: Path, vocab_size: int) -> str | None:
    """What is wrong with a shard file, or None. A file that cannot be opened raises `OSError`."""
    with path.open("rb") as file:
        raw = file.read(HEADER_BYTES)
        size = os.fstat(file.fileno()).st_size
    if len(raw) < HEADER_BYTES:
        return f"truncated: {size:,} bytes are less than the header's {HEADER_BYTES:,}"
    magic, version, tokens = np.frombuffer(raw, dtype="<i4")[:3].tolist()
    if magic != MAGIC:
        return f"not a token shard: it starts with {magic}, not {MAGIC}"
    if version != VERSION:
        return f"token shard of version {version}, and only {VERSION} can be read"
    if tokens <= 0:
        return f"the header claims {tokens:,} tokens"
    if size != HEADER_BYTES + tokens * _TOKEN.itemsize:
        return (
            f"{size:,} bytes, but {tokens:,} tokens with the header take "
            f"{HEADER_BYTES + tokens * _TOKEN.itemsize:,}: truncated or altered"
        )
    largest = _largest(_tokens_of(path))
    if largest >= vocab_size:
        return f"token {largest:,} is beyond the vocabulary of {vocab_size:,}"
    return None


def _tokens_of(path: Path) -> np.memmap[tuple[int], np.dtype[np.uint16]]:
    return np.memmap(path, dtype=_TOKEN, mode="r", offset=HEADER_BYTES)


def _largest(tokens: NDArray[np.uint16]) -> int:
    starts = range(0, len(tokens), _TOKENS_AT_ONCE)
    return max(int(tokens[start : start + _TOKENS_AT_ONCE].max()) for start in starts)


def _header(tokens: int) -> bytes:
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens
    return header.tobytes()
