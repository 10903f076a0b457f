"""Token shards: 256 little-endian int32 (20240520, 1, token count, zeros), then uint16 tokens.

llm.c, modded-nanogpt and dion read the same format.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import weakref
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Annotated, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt

from pipelines.data.manifest import Frozen, Sha256, ShardEntry, SourcePosition
from pipelines.data.tokenizers import Tokens
from pipelines.errors import AsgoError
from pipelines.storage import naming, sha256_of, sync

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
MAX_SHARD_TOKENS = 2**31 - 1  # the count is a signed 32-bit integer
_TOKEN = np.dtype("<u2")
_TOKENS_AT_ONCE = 1 << 20
_OTHER_FILES = 512


class OpenShardState(Frozen):
    """Checkpoint of a shard that is not full: its length, and the digest of its hidden file up to there."""

    file: str
    tokens: NonNegativeInt
    documents: NonNegativeInt
    sha256: Sha256


class WriterState(Frozen):
    """Checkpoint of a `ShardWriter`, from which another one resumes."""

    entries: Annotated[tuple[ShardEntry, ...], Field(strict=False)] = ()
    open_shard: OpenShardState | None = None
    end: SourcePosition = SourcePosition(document=0, token=0)


_BEGINNING = WriterState()


class ShardWriter:
    """Writes documents to shard files of exactly `shard_tokens` tokens; the last file may be shorter.

    A document that does not fit continues in the next file. `files` gives the paths in order; after the last one, the
    writer takes no more tokens. A shard has a hidden name until it is complete, and keeps it if the context ends
    without `finish`. Another writer resumes from the `state` that `checkpoint` returned.
    """

    def __init__(self, files: Iterable[Path], *, shard_tokens: int, state: WriterState = _BEGINNING) -> None:
        """Raises `AsgoError` if the files do not match `state`."""
        self._files = iter(files)
        self._shard_tokens = shard_tokens
        self._entries = list(state.entries)
        self.end = state.end
        """The position in the source after the tokens written."""
        for entry in state.entries:
            _require_size(next(self._files).with_name(entry.file), entry.tokens)
        self._shard: _OpenShard | None = None
        if state.open_shard is not None:
            self._shard = _OpenShard.reopen(next(self._files), shard_tokens, state.open_shard)

    @property
    def entries(self) -> list[ShardEntry]:
        """The complete shards."""
        return self._entries

    @property
    def tokens(self) -> int:
        """Tokens written so far, to complete shards and the open one."""
        return sum(entry.tokens for entry in self._entries) + (self._shard.tokens if self._shard else 0)

    def write(
        self, tokens: Tokens, starts: NDArray[np.int64], documents: NDArray[np.int64], *, complete: bool = True
    ) -> int:
        """Append documents, `tokens` (tokens,), and return the number of tokens taken: fewer after the last file.

        Each document begins with its end-of-text token. `starts` (documents,) are the ascending indices in `tokens`
        where documents begin: the first is 0, or negative if that document began in an earlier call. `documents`
        (documents,) are their numbers in the source. The last document continues in the next call unless `complete`.
        """
        taken = 0
        while taken < len(tokens):
            self._shard = shard = self._shard or self._open()
            if shard is None:
                break
            part = slice(taken, taken + shard.room)
            first, last = np.searchsorted(starts, (taken, taken + shard.room))
            shard.append(tokens[part], documents=int(last - first))
            taken = min(part.stop, len(tokens))
            self.end = _position(taken, len(tokens) if complete else None, starts, documents)
            if not shard.room:
                self._close(shard)
        return taken

    def checkpoint(self) -> WriterState:
        """Flush everything written to disk and return the state."""
        open_shard = None if self._shard is None else self._shard.checkpoint()
        return WriterState(entries=tuple(self._entries), open_shard=open_shard, end=self.end)

    def finish(self) -> list[ShardEntry]:
        """Complete the last shard and return one entry per file."""
        if self._shard is not None:
            self._close(self._shard)
        return self._entries

    def _open(self) -> _OpenShard | None:
        path = next(self._files, None)
        return None if path is None else _OpenShard.create(path, self._shard_tokens)

    def _close(self, shard: _OpenShard) -> None:
        self._entries.append(shard.finish(self.end))
        self._shard = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._shard is not None:
            self._shard.close()


class _OpenShard:
    """One shard file under a hidden name until it is complete."""

    def __init__(self, path: Path, file: BinaryIO, digest: hashlib._Hash, capacity: int) -> None:
        self.path = path
        self.tokens = 0
        self._documents = 0
        self._file = file
        self._digest = digest
        self._capacity = capacity

    @classmethod
    def create(cls, path: Path, capacity: int) -> _OpenShard:
        """Create an empty shard."""
        with naming(path):
            _staged(path).unlink(missing_ok=True)  # also a symbolic link, which must not be followed
            shard = cls(path, _staged(path).open("xb"), hashlib.sha256(), capacity)
        # The header of a full shard: only the shorter last shard needs another header and a new digest.
        shard._put(_header(capacity))
        return shard

    @classmethod
    def reopen(cls, path: Path, capacity: int, state: OpenShardState) -> _OpenShard:
        """Reopen a shard at a checkpoint; drop what was written after it."""
        staged = _staged(path)
        if path.exists():  # it was completed after the checkpoint
            path.replace(staged)
        size = HEADER_BYTES + state.tokens * _TOKEN.itemsize
        if staged.is_file() and not staged.is_symlink() and staged.stat().st_size >= size:
            os.truncate(staged, size)
            with staged.open("r+b") as written:
                written.write(_header(capacity))  # it may have been finished as a shorter one
                written.seek(0)
                digest = hashlib.file_digest(written, "sha256")
            if digest.hexdigest() == state.sha256:
                shard = cls(path, staged.open("ab"), digest, capacity)
                shard.tokens, shard._documents = state.tokens, state.documents
                return shard
        raise AsgoError(f"{staged}: missing or changed since the checkpoint; pass --overwrite to start again")

    @property
    def room(self) -> int:
        return self._capacity - self.tokens

    def append(self, tokens: Tokens, documents: int) -> None:
        self._put(tokens.astype(_TOKEN, copy=False).data)
        self.tokens += len(tokens)
        self._documents += documents

    def checkpoint(self) -> OpenShardState:
        self._sync()
        return OpenShardState(
            file=self.path.name, tokens=self.tokens, documents=self._documents, sha256=self._digest.hexdigest()
        )

    def finish(self, next_start: SourcePosition) -> ShardEntry:
        self._sync()
        digest = self._digest.hexdigest()
        self.close()
        staged = _staged(self.path)
        if self.room:
            digest = _correct_header(staged, self.tokens)
        staged.rename(self.path)
        sync(self.path.parent)
        return ShardEntry(
            file=self.path.name, sha256=digest, tokens=self.tokens, documents=self._documents, next_start=next_start
        )

    def close(self) -> None:
        with contextlib.suppress(OSError):  # closing flushes, which fails again on a full disk
            self._file.close()

    def _sync(self) -> None:
        with naming(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def _put(self, content: bytes | memoryview) -> None:
        with naming(self.path):
            self._file.write(content)
        self._digest.update(content)


def _staged(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _correct_header(path: Path, tokens: int) -> str:
    """Write the token count of a shorter shard into its header, and return the file's digest."""
    with naming(path), path.open("r+b") as file:
        file.write(_header(tokens))
        file.flush()
        os.fsync(file.fileno())
    return sha256_of(path)


def _position(taken: int, end: int | None, starts: NDArray[np.int64], documents: NDArray[np.int64]) -> SourcePosition:
    """Return the position in the source after `taken` tokens. The last document ends at `end`; None: not yet."""
    if taken == end:
        return SourcePosition(document=int(documents[-1]) + 1, token=0)
    inside = int(np.searchsorted(starts, taken, side="right")) - 1
    return SourcePosition(document=int(documents[inside]), token=taken - int(starts[inside]))


def _require_size(path: Path, tokens: int) -> None:
    size = HEADER_BYTES + tokens * _TOKEN.itemsize
    if not path.exists() or path.stat().st_size != size:
        raise AsgoError(f"{path}: this finished shard is missing or has changed; pass --overwrite to start again")


class TokenFile:
    """The tokens of a file from byte `offset` to its end, read on request; `len` is their number.

    Not memory-mapped: if a mapped file becomes shorter, the system kills the process with SIGBUS.
    """

    def __init__(self, path: Path, offset: int) -> None:
        self.path = path
        self._offset = offset
        # Stays open, so the tokens stay the same if the file is replaced or removed.
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)
        self._tokens = (os.fstat(self._descriptor).st_size - offset) // _TOKEN.itemsize

    def __len__(self) -> int:
        return self._tokens

    def read_into(self, tokens: Tokens, start: int) -> None:
        """Fill `tokens` (tokens,) from index `start` on. Raises `AsgoError` if the file has become shorter."""
        place, size = self._offset + start * _TOKEN.itemsize, tokens.nbytes
        try:
            count = os.preadv(self._descriptor, [tokens.data], place)
            while 0 < count < size:  # a short read: rare, after a signal or on a network file system
                more = os.preadv(self._descriptor, [tokens.view(np.uint8)[count:].data], place + count)
                count = count + more if more else 0
        except OSError as error:
            error.filename = str(self.path)
            raise
        if count < size:
            raise AsgoError(f"{self.path}: it has become shorter while in use; copy it again, and resume")

    def read(self) -> Tokens:
        """Return all tokens, (tokens,)."""
        tokens = np.empty(self._tokens, dtype=_TOKEN)
        for start in range(0, self._tokens, _TOKENS_AT_ONCE):  # one system call reads at most 2 GB
            self.read_into(tokens[start : start + _TOKENS_AT_ONCE], start)
        return tokens

    def largest(self) -> int:
        """Return the largest token; 0 if there is none."""
        buffer, largest = np.empty(_TOKENS_AT_ONCE, dtype=_TOKEN), 0
        for start in range(0, self._tokens, _TOKENS_AT_ONCE):
            part = buffer[: self._tokens - start]
            self.read_into(part, start)
            largest = max(largest, int(part.max()))
        return largest


def allow_open_files(count: int) -> None:
    """Raise this process's limit of open files by `count`, as far as the system permits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def open_shard(path: Path, vocab_size: int) -> TokenFile:
    """Open a shard and check its content.

    Raises `AsgoError` for a wrong magic number, version or size, and for a token beyond the vocabulary.
    """
    problem = shard_problem(path, vocab_size)
    if problem is not None:
        raise AsgoError(f"{path}: {problem}; make the folder again, or copy this file again")
    return TokenFile(path, HEADER_BYTES)


def shard_problem(path: Path, vocab_size: int) -> str | None:
    """Return what is wrong with a shard file, or None. Raises `OSError` if it cannot be opened."""
    return header_problem(path) or vocabulary_problem(TokenFile(path, HEADER_BYTES).largest(), vocab_size)


def header_problem(path: Path) -> str | None:
    """Return what is wrong with a shard file's header or size, or None. Does not read the tokens."""
    with path.open("rb") as file:
        raw = file.read(HEADER_BYTES)
        size = os.fstat(file.fileno()).st_size
    if len(raw) < HEADER_BYTES:
        return f"truncated: {size:,} bytes are less than the header's {HEADER_BYTES:,}"
    magic, version, tokens = np.frombuffer(raw, dtype="<i4")[:3].tolist()
    if magic != MAGIC:
        return f"not a token shard: it starts with {magic}, not {MAGIC}"
    if version != VERSION:
        return f"token shard of version {version}; only version {VERSION} can be read"
    if tokens <= 0:
        return f"the header claims {tokens:,} tokens"
    if size != HEADER_BYTES + tokens * _TOKEN.itemsize:
        return (
            f"{size:,} bytes, but the header and {tokens:,} tokens take "
            f"{HEADER_BYTES + tokens * _TOKEN.itemsize:,}: truncated or altered"
        )
    return None


def vocabulary_problem(largest: int, vocab_size: int) -> str | None:
    """Return what is wrong with a shard with this largest token, or None."""
    return f"token {largest:,} is beyond the vocabulary of {vocab_size:,}" if largest >= vocab_size else None


def _header(tokens: int) -> bytes:
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens
    return header.tobytes()
