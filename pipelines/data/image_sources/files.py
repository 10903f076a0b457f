"""Files of labelled images in a folder, or in an archive that is read as if it were one."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from pipelines.errors import AsgoError

MAX_IMAGE_BYTES = 256 << 20
"""Maximum size of an image file. It limits the memory, whatever an archive claims."""
HEAD_BYTES = 16
"""How much of a file shows that it is an image."""
_IGNORED = ("__macosx", "thumbs.db", "desktop.ini")

_GROUP_BYTES, _GROUP_FILES = 1 << 20, 64

T = TypeVar("T")
U = TypeVar("U")


class File(NamedTuple):
    """A file: its path in the source, its size in bytes, its place, which only its source knows, and its time."""

    path: str
    size: int
    place: Any
    modified_ns: int = 0


class Folder(Protocol):
    """A folder of a source. `path` is relative to the source, "" for the whole. Ignored files are left out."""

    path: str

    @property
    def folders(self) -> Mapping[str, Folder]:
        """The folders in it by name, sorted."""

    @property
    def files(self) -> Mapping[str, File]:
        """The files in it by name, sorted."""


class FileSource(Protocol):
    """A folder or archive. Methods raise `AsgoError` for files that cannot be read."""

    top: Folder

    @property
    def is_stream(self) -> bool:
        """Whether the files can only be read in the order of the source, all of them in each pass."""

    def where(self, path: str) -> str:
        """Return how messages name a path of the source."""

    def heads(self, files: Sequence[File]) -> Iterator[bytes]:
        """Yield the first `HEAD_BYTES` bytes of each file, in order."""

    def contents(self, files: Sequence[File]) -> Iterator[tuple[int, bytes]]:
        """Yield the index of each file and its content, always in the same order."""

    def offset(self, file: File) -> int | None:
        """Return where the content lies unaltered in the archive; None if it does not."""


def is_ignored(name: str) -> bool:
    """Whether a file or folder is hidden, or what macOS and Windows add."""
    return name.startswith(".") or name.casefold() in _IGNORED


class LocalFiles:
    """A folder on the disk. Symbolic links are followed. `threads` read ahead, for disks with a long latency."""

    is_stream = False

    def __init__(self, folder: Path, threads: int = 1) -> None:
        self.top: Folder = _LocalFolder(folder, "")
        self._folder = folder
        self._threads = threads

    def where(self, path: str) -> str:
        return str(self._folder / path)

    def heads(self, files: Sequence[File]) -> Iterator[bytes]:
        return self._ahead(HEAD_BYTES, files)

    def contents(self, files: Sequence[File]) -> Iterator[tuple[int, bytes]]:
        return enumerate(self._ahead(MAX_IMAGE_BYTES, files))

    def offset(self, file: File) -> int | None:
        return None

    def _ahead(self, most: int, files: Sequence[File]) -> Iterator[bytes]:
        """Read the first `most` bytes of each file, several files in a thread at a time."""

        def read(several: Sequence[File]) -> list[bytes]:
            return [self._read(most, file) for file in several]

        return chain.from_iterable(read_ahead(read, _groups(files, most), self._threads))

    def _read(self, most: int, file: File) -> bytes:
        size = min(file.size, most)
        try:
            descriptor = os.open(file.place, os.O_RDONLY)
            try:
                is_same = os.fstat(descriptor).st_size == file.size
                content = os.read(descriptor, size) if is_same else b""
            finally:
                os.close(descriptor)
        except OSError as error:
            raise AsgoError(f"{file.place}: {error.strerror}") from None
        if len(content) != size:
            raise AsgoError(f"{file.place}: its size has changed since the folder was listed; run the command again")
        return content


class _LocalFolder:
    def __init__(self, folder: Path, path: str) -> None:
        self.path = path
        self._folder = folder

    @property
    def folders(self) -> Mapping[str, Folder]:
        return self._entries[0]

    @property
    def files(self) -> Mapping[str, File]:
        return self._entries[1]

    @cached_property
    def _entries(self) -> tuple[dict[str, Folder], dict[str, File]]:
        folders: dict[str, Folder] = {}
        files: dict[str, File] = {}
        try:
            with os.scandir(self._folder) as entries:
                for entry in sorted(entries, key=lambda each: each.name):
                    path = f"{self.path}/{entry.name}" if self.path else entry.name
                    if is_ignored(entry.name):
                        continue
                    if entry.is_dir():
                        folders[entry.name] = _LocalFolder(Path(entry.path), path)
                    elif entry.is_file():
                        status = entry.stat()
                        files[entry.name] = File(path, status.st_size, entry.path, status.st_mtime_ns)
                    else:
                        raise AsgoError(f"{entry.path}: neither a file nor a folder (a broken link?); remove it")
        except OSError as error:
            raise AsgoError(f"{error.filename or self._folder}: {error.strerror}") from None
        return folders, files


def _groups(files: Sequence[File], most: int) -> Iterator[list[File]]:
    """Group files of which `most` bytes are read: handing each small file to a thread takes longer than reading it."""
    group: list[File] = []
    size = 0
    for file in files:
        group.append(file)
        size += min(file.size, most)
        if size >= _GROUP_BYTES or len(group) == _GROUP_FILES:
            yield group
            group, size = [], 0
    yield group


def read_ahead(read: Callable[[T], U], items: Iterable[T], threads: int) -> Iterator[U]:
    """Yield `read(item)` for each item in order, with a few reads in progress."""
    if threads <= 1:
        yield from map(read, items)
        return
    pending: deque[Future[U]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                pending.append(pool.submit(read, item))
                if len(pending) > 2 * threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
