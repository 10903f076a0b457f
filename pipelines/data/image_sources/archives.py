"""Read the files of an archive: tar, compressed tar, or zip. Nothing is extracted."""

from __future__ import annotations

import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.data.image_sources.files import HEAD_BYTES, File, FileSource, Folder, is_ignored
from pipelines.data.images.tar import Member, Tar, is_plain_path, iterate_members, open_packed_tar, open_tar
from pipelines.data.progress import Progress
from pipelines.errors import AsgoError, UsageError

_ZIP = (b"PK\x03\x04", b"PK\x05\x06")
_PACKED = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ\0")
_USTAR_AT = 257
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_DEEPEST = 32
_REPORT_EVERY = 64
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, OverflowError, struct.error)


def open_archive(path: Path, report: Progress) -> FileSource:
    """Return the files of an archive, recognized by its first bytes. Calls `report` for every file.

    Raises `UsageError` for another kind of file, and `AsgoError` for a damaged archive and one with members that are
    refused: links, devices, absolute paths, "..", encrypted files.
    """
    try:
        with path.open("rb") as file:
            start = file.read(_USTAR_AT + 5)
    except OSError as error:
        raise AsgoError(f"{path}: {error.strerror}") from None
    if start.startswith(_ZIP):
        return ZipFiles(path)
    if start[_USTAR_AT:] == b"ustar" or path.suffix.lower() == ".tar":
        return TarFiles(path, report)
    if start.startswith(_PACKED):
        return PackedTarFiles(path, report)
    raise UsageError(f"{path}: neither a folder nor an archive (.zip, .tar, .tar.gz, .tar.zst)")


@dataclass
class _ArchiveFolder:
    path: str
    folders: dict[str, Folder] = field(default_factory=dict)
    files: dict[str, File] = field(default_factory=dict)


def _tree(archive: Path, files: Iterable[File]) -> Folder:
    """Return the folders that the paths of `files` imply. Raises `AsgoError` for a path that is too deep."""
    made = {"": _ArchiveFolder("")}

    def folder(path: str) -> _ArchiveFolder:
        if path not in made:
            made[path] = _ArchiveFolder(path)
            parent, _, name = path.rpartition("/")
            folder(parent).folders[name] = made[path]
        return made[path]

    for file in sorted(files):
        *parents, name = file.path.split("/")
        if len(parents) > _DEEPEST:
            raise AsgoError(
                f"{archive}: {file.path[:40]}...: in more than {_DEEPEST} folders; it is no data set of images"
            )
        if not any(map(is_ignored, (*parents, name))):
            folder("/".join(parents)).files[name] = file
    for each in made.values():
        each.folders = dict(sorted(each.folders.items()))
    return made[""]


def _members(tar: Tar, report: Progress) -> Iterator[Member]:
    for number, member in enumerate(iterate_members(tar)):
        if number % _REPORT_EVERY == 0:
            report(f"reading {Path(tar.name).name}", member.offset, tar.end or 0)
        yield member


class TarFiles:
    """An uncompressed tar archive. The place of a file is its offset."""

    is_stream = False

    def __init__(self, path: Path, report: Progress) -> None:
        self._path = path
        with open_tar(path, folders=True) as tar:
            self.top = _tree(path, (File(name, size, offset) for name, offset, size in _members(tar, report)))

    def where(self, path: str) -> str:
        return f"{self._path}: {path}" if path else str(self._path)

    def heads(self, files: Sequence[File]) -> Iterator[bytes]:
        with open_tar(self._path) as tar:
            for file in files:
                yield tar.read(min(HEAD_BYTES, file.size), file.place)

    def contents(self, files: Sequence[File]) -> Iterator[tuple[int, bytes]]:
        with open_tar(self._path) as tar:
            for number, file in enumerate(files):
                yield number, tar.read(file.size, file.place)

    def offset(self, file: File) -> int | None:
        return int(file.place)


class PackedTarFiles:
    """A tar archive compressed as a whole. The place of a file is its head, kept from the first pass."""

    is_stream = True

    def __init__(self, path: Path, report: Progress) -> None:
        self._path = path

        def skipping(position: int) -> None:
            report(f"reading {path.name}", position, 0)

        with open_packed_tar(path, folders=True, report=skipping) as tar:
            members = iterate_members(tar)
            files = (File(name, size, tar.read(min(HEAD_BYTES, size), offset)) for name, offset, size in members)
            self.top = _tree(path, files)

    def where(self, path: str) -> str:
        return f"{self._path}: {path}" if path else str(self._path)

    def heads(self, files: Sequence[File]) -> Iterator[bytes]:
        return (file.place for file in files)

    def contents(self, files: Sequence[File]) -> Iterator[tuple[int, bytes]]:
        numbers = {file.path: number for number, file in enumerate(files)}
        with open_packed_tar(self._path, folders=True) as tar:
            for name, offset, size in iterate_members(tar):
                if name in numbers:
                    yield numbers[name], tar.read(size, offset)

    def offset(self, file: File) -> int | None:
        return None


class ZipFiles:
    """A zip archive. The place of a file is its `ZipInfo`."""

    is_stream = False

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._archive = zipfile.ZipFile(path)
        except _DAMAGE as error:
            raise self._damaged(error) from None
        self.top = _tree(path, self._files())

    def where(self, path: str) -> str:
        return f"{self._path}: {path}" if path else str(self._path)

    def heads(self, files: Sequence[File]) -> Iterator[bytes]:
        return (self._read(file, min(HEAD_BYTES, file.size)) for file in files)

    def contents(self, files: Sequence[File]) -> Iterator[tuple[int, bytes]]:
        return ((number, self._read(file, file.size)) for number, file in enumerate(files))

    def offset(self, file: File) -> int | None:
        info: zipfile.ZipInfo = file.place
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            return None
        descriptor = self._archive.fp.fileno()  # type: ignore[union-attr]
        header = os.pread(descriptor, _LOCAL_HEADER.size, info.header_offset)
        if len(header) < _LOCAL_HEADER.size or not header.startswith(_ZIP[0]):
            raise self._damaged(zipfile.BadZipFile(f"no header of {file.path}"))
        _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        return int(info.header_offset + _LOCAL_HEADER.size + name_length + extra_length)

    def _files(self) -> Iterator[File]:
        names: set[str] = set()
        for info in self._archive.infolist():
            name = info.filename.replace("\\", "/").removeprefix("./")  # some writers on Windows use backslashes
            problem = _problem(info, name) or ("occurs twice" if name in names else None)
            if problem:
                raise AsgoError(f"{self._path}: member {info.filename!r} {problem}: refused")
            names.add(name)
            if not name.endswith("/"):
                yield File(name, info.file_size, info)

    def _read(self, file: File, size: int) -> bytes:
        try:
            with self._archive.open(file.place) as member:
                content = member.read(size)
        except _DAMAGE as error:
            raise self._damaged(error, file.path) from None
        if len(content) < size:
            raise self._damaged(EOFError("too short"), file.path)
        return content

    def _damaged(self, error: Exception, name: str = "") -> AsgoError:
        return AsgoError(f"{self.where(name)}: damaged zip file ({' '.join(str(error).split())})")


def _problem(info: zipfile.ZipInfo, name: str) -> str | None:
    """Return why a member of a zip archive is refused, or None."""
    kind = stat.S_IFMT(info.external_attr >> 16)
    if not is_plain_path(name.removesuffix("/")) or (name[1:2] == ":" and name[:1].isalpha()):
        return "is not a plain path"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a symbolic link" if kind == stat.S_IFLNK else "is a device"
    if info.flag_bits & 1:
        return "is encrypted"
    if info.compress_type not in _METHODS:
        return f"is compressed by method {info.compress_type}, not stored or deflated"
    return None
