"""Token shards: 256 little-endian int32 (20240520, 1, token count, zeros), then uint16 tokens.

The format that llm.c, modded-nanogpt and dion read.
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
    """A shard that is not full yet: how much of its hidden file counts, and the digest of that much."""

    file: str
    tokens: NonNegativeInt
    documents: NonNegativeInt
    sha256: Sha256


class WriterState(Frozen):
    """How far a `ShardWriter` has come, for another one to go on from."""

    entries: Annotated[tuple[ShardEntry, ...], Field(strict=False)] = ()
    open_shard: OpenShardState | None = None
    end: SourcePosition = SourcePosition(document=0, token=0)


_BEGINNING = WriterState()


class ShardWriter:
    """Streams documents into shard files of exactly `shard_tokens` tokens; the last one may be shorter.

    A document that does not fit goes on in the next file. `files` gives the paths in order; when they run out, no
    more is taken. A shard has a hidden name until it is complete; leaving the context without `finish` leaves it so,
    and with the `state` that `checkpoint` gave, another writer goes on from there.
    """

    def __init__(self, files: Iterable[Path], *, shard_tokens: int, state: WriterState = _BEGINNING) -> None:
        """Raises `AsgoError` when what `state` tells of is not on the disk any more."""
        self._files = iter(files)
        self._shard_tokens = shard_tokens
        self._entries = list(state.entries)
        self.end = state.end
        """Where the source goes on after what is written."""
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
        """Tokens written so far, into complete shards and the one that is open."""
        return sum(entry.tokens for entry in self._entries) + (self._shard.tokens if self._shard else 0)

    def write(
        self, tokens: Tokens, starts: NDArray[np.int64], documents: NDArray[np.int64], *, complete: bool = True
    ) -> int:
        """Append documents, `tokens` (tokens,); each begins with its end-of-text token.

        `starts` (documents,) are the places in `tokens` where they begin, ascending from 0, or from a negative place
        where the first one began in earlier calls; `documents` (documents,) are their numbers in the source. The last
        one goes on in the next call unless it is `complete`. Returns how many tokens were taken: fewer when the files
        are used up.
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
        """Flush to disk all that was written, and say how far that is."""
        open_shard = None if self._shard is None else self._shard.checkpoint()
        return WriterState(entries=tuple(self._entries), open_shard=open_shard, end=self.end)

    def finish(self) -> list[ShardEntry]:
        """Complete the last shard and return one entry for each file."""
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
        """Begin an empty shard."""
        with naming(path):
            _staged(path).unlink(missing_ok=True)  # and a link that somebody has put there is not followed
            shard = cls(path, _staged(path).open("xb"), hashlib.sha256(), capacity)
        # The header of a full shard: the running digest is then right for every shard but a shorter last one.
        shard._put(_header(capacity))
        return shard

    @classmethod
    def reopen(cls, path: Path, capacity: int, state: OpenShardState) -> _OpenShard:
        """Go on with a shard as it was at a checkpoint; what was written after it is dropped."""
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
        raise AsgoError(f"{staged}: not what was written there; pass --overwrite to start again")

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
    """Write the true count of a shorter shard, and return the file's digest."""
    with naming(path), path.open("r+b") as file:
        file.write(_header(tokens))
        file.flush()
        os.fsync(file.fileno())
    return sha256_of(path)


def _position(taken: int, end: int | None, starts: NDArray[np.int64], documents: NDArray[np.int64]) -> SourcePosition:
    """The place in the source after `taken` tokens; the last document ends at `end`, if it does."""
    if taken == end:
        return SourcePosition(document=int(documents[-1]) + 1, token=0)
    inside = int(np.searchsorted(starts, taken, side="right")) - 1
    return SourcePosition(document=int(documents[inside]), token=taken - int(starts[inside]))


def _require_size(path: Path, tokens: int) -> None:
    size = HEADER_BYTES + tokens * _TOKEN.itemsize
    if not path.exists() or path.stat().st_size != size:
        raise AsgoError(f"{path}: this finished shard is missing or has changed; pass --overwrite to start again")


class TokenFile:
    """The tokens of a file from byte `offset` to its end, read when they are asked for; its length is their number.

    They are not mapped into memory: where a mapped file has become shorter, the system ends the process without a word.
    """

    def __init__(self, path: Path, offset: int) -> None:
        self.path = path
        self._offset = offset
        # It stays open as long as this is in use: the same tokens, whatever becomes of the name.
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)
        self._tokens = (os.fstat(self._descriptor).st_size - offset) // _TOKEN.itemsize

    def __len__(self) -> int:
        return self._tokens

    def read_into(self, tokens: Tokens, start: int) -> None:
        """Fill `tokens` (tokens,) from place `start` on. Raises `AsgoError` if the file has become shorter."""
        place, size = self._offset + start * _TOKEN.itemsize, tokens.nbytes
        try:
            count = os.preadv(self._descriptor, [tokens.data], place)
            while 0 < count < size:  # seldom: a signal, a network's file system
                more = os.preadv(self._descriptor, [tokens.view(np.uint8)[count:].data], place + count)
                count = count + more if more else 0
        except OSError as error:
            error.filename = str(self.path)
            raise
        if count < size:
            raise AsgoError(f"{self.path}: it has become shorter while in use; copy it again, and resume")

    def read(self) -> Tokens:
        """All tokens, (tokens,)."""
        tokens = np.empty(self._tokens, dtype=_TOKEN)
        for start in range(0, self._tokens, _TOKENS_AT_ONCE):  # the system reads two gigabytes at once at most
            self.read_into(tokens[start : start + _TOKENS_AT_ONCE], start)
        return tokens

    def largest(self) -> int:
        """The largest token; 0 of none."""
        buffer, largest = np.empty(_TOKENS_AT_ONCE, dtype=_TOKEN), 0
        for start in range(0, self._tokens, _TOKENS_AT_ONCE):
            part = buffer[: self._tokens - start]
            self.read_into(part, start)
            largest = max(largest, int(part.max()))
        return largest


def allow_open_files(count: int) -> None:
    """Let this process have `count` files open besides its others, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def open_shard(path: Path, vocab_size: int) -> TokenFile:
    """The tokens of a shard.

    Raises `AsgoError` for a wrong magic number, version or size and for a token beyond the vocabulary.
    """
    problem = shard_problem(path, vocab_size)
    if problem is not None:
        raise AsgoError(f"{path}: {problem}; make the folder again, or copy this file again")
    return TokenFile(path, HEADER_BYTES)


def shard_problem(path: Path, vocab_size: int) -> str | None:
    """What is wrong with a shard file, or None. A file that cannot be opened raises `OSError`."""
    return header_problem(path) or vocabulary_problem(TokenFile(path, HEADER_BYTES).largest(), vocab_size)


def header_problem(path: Path) -> str | None:
    """What is wrong with the header of a shard file or, by the header, with its size; the tokens are not read."""
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
    return None


def vocabulary_problem(largest: int, vocab_size: int) -> str | None:
    """What is wrong with a shard whose largest token this is, or None."""
    return f"token {largest:,} is beyond the vocabulary of {vocab_size:,}" if largest >= vocab_size else None


def _header(tokens: int) -> bytes:
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens
    return header.tobytes()
