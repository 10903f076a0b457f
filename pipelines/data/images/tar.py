"""Find the members of a tar archive, also a compressed one, and of the tar archives inside it, from their headers."""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

from pipelines.data.unpacking import unpacked
from pipelines.errors import AsgoError

_BLOCK = 512
_END = bytes(_BLOCK)
_FIELDS = struct.Struct("100s 24x 12s 12x 8s 1s 100x 6s 82x 155s 12x")  # name, size, checksum, kind, magic, prefix
_FILE_KINDS = (b"0", b"\0")
_FOLDERS = ("", ".", "..")
_LONG_NAME, _PAX, _PAX_OF_ALL = b"L", b"x", b"g"
_EXTENSIONS = (_LONG_NAME, _PAX, _PAX_OF_ALL)
_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"5": "a folder",
    b"6": "a pipe",
}
_LONGEST_EXTENSION = 1 << 20
_PIECE = 1 << 20


class Member(NamedTuple):
    """A file in an archive: its name, the offset of its content in the outermost archive, and its size in bytes."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Tar:
    """A tar archive between the offsets `start` and `end` of an open file; error messages use `name`.

    `read` returns so many bytes from an offset on; fewer at the end. `end` is None for a compressed archive, where
    offsets may only grow. With `folders`, members may be in folders.
    """

    read: Callable[[int, int], bytes]
    start: int
    end: int | None
    name: str
    folders: bool = False

    def inside(self, member: Member) -> Tar:
        """Return the member as an archive."""
        return Tar(self.read, member.offset, member.offset + member.size, f"{self.name}: {member.name}")

    def refuse(self, problem: str) -> NoReturn:
        """Raise `AsgoError` with the archive's name."""
        raise AsgoError(f"{self.name}: {problem}")


@contextlib.contextmanager
def open_tar(path: Path, *, folders: bool = False) -> Iterator[Tar]:
    """Open the archive at `path`. Raises `AsgoError` if it cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise AsgoError(f"{path}: {error.strerror}") from None
    try:
        yield Tar(partial(os.pread, descriptor), 0, os.fstat(descriptor).st_size, str(path), folders)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def open_packed_tar(
    path: Path, *, folders: bool = False, report: Callable[[int], None] = lambda position: None
) -> Iterator[Tar]:
    """Open an archive compressed with gzip or zstd. Calls `report` often while bytes are skipped, with their number.

    Raises `AsgoError` if the archive cannot be read or is damaged.
    """
    with unpacked(path) as stream:
        yield Tar(_Forward(stream, report).read, 0, None, str(path), folders)
        while stream.read(_PIECE):  # to the end, where the checksum is
            pass


class _Forward:
    """Reads a stream from given offsets, which only grow."""

    def __init__(self, stream: BinaryIO, report: Callable[[int], None]) -> None:
        self._stream = stream
        self._report = report
        self._position = 0

    def read(self, size: int, position: int) -> bytes:
        while self._position < position:
            skipped = len(self._stream.read(min(_PIECE, position - self._position)))
            if not skipped:
                return b""
            self._position += skipped
            self._report(self._position)
        content = self._stream.read(size)
        self._position += len(content)
        return content


def read_members(tar: Tar) -> list[Member]:
    """Return the files of `tar` in the order of the archive; raises as `iterate_members` does."""
    return list(iterate_members(tar))


def iterate_members(tar: Tar) -> Iterator[Member]:
    """Yield the files of `tar` in the order of the archive. Their content may be read before the next one is requested.

    Only plain files with plain names are accepted. Raises `AsgoError` for a member that is a link or a device, an
    absolute path, "..", unprintable characters, two members with the same name, a truncated archive, and a file that is
    not a tar archive; for a folder and a name with a slash, unless `tar.folders`. Reads the long names of GNU tar and
    pax.
    """
    names: set[str] = set()
    position, extended = tar.start, None
    while (header := _read_header(tar, position)) != _END:
        name, size_field, checksum, kind, magic, prefix = _FIELDS.unpack(header)
        if not _is_sound(header, checksum):
            tar.refuse("not a tar archive" if position == tar.start else f"damaged at byte {position:,}")
        size = _size(tar, size_field, position)
        if kind in _EXTENSIONS:
            extended = _extend(tar, kind, position + _BLOCK, size, extended or _Extended())
        else:
            if magic == b"ustar\0" and prefix[0]:
                name = prefix.partition(b"\0")[0] + b"/" + name
            if extended is not None:
                name, size = extended.name or name, size if extended.size is None else extended.size
            if tar.end is not None and position + _BLOCK + size > tar.end:
                _refuse_truncated(tar, position + _BLOCK + size)
            plain = _plain_name(tar, kind, name.partition(b"\0")[0])
            if plain in names:
                tar.refuse(f"two members are named {plain!r}")
            if plain:
                names.add(plain)
                yield Member(plain, position + _BLOCK, size)
            extended = None
        position += _BLOCK + -(-size // _BLOCK) * _BLOCK


def _read_header(tar: Tar, position: int) -> bytes:
    if tar.end is not None and position + _BLOCK > tar.end:
        _refuse_truncated(tar, position + _BLOCK)
    header = tar.read(_BLOCK, position)
    if len(header) < _BLOCK:
        tar.refuse("truncated" if tar.end is None else "was truncated while it was read")
    return header


def _is_sound(header: bytes, checksum: bytes) -> bool:
    """Whether the checksum is right: the sum of the header's bytes, with its own field as spaces."""
    try:
        stated = _octal(checksum)
    except ValueError:
        return False
    # The low half of an Adler-32 is the sum plus one, modulo 65521: the same test in a tenth of the time of sum().
    return (1 + stated + sum(checksum) - 8 * ord(" ")) % 65521 == zlib.adler32(header) & 0xFFFF


def _refuse_truncated(tar: Tar, end: int) -> NoReturn:
    assert tar.end is not None
    tar.refuse(f"truncated: it has {tar.end - tar.start:,} bytes instead of at least {end - tar.start:,}")


def _size(tar: Tar, field: bytes, position: int) -> int:
    if field[0] == 0x80:  # base 256, for 8 GiB and more
        return int.from_bytes(field[1:], "big")
    try:
        return _octal(field)
    except ValueError:
        tar.refuse(f"damaged at byte {position:,}: a member's size cannot be read")


def _octal(field: bytes) -> int:
    digits = field.strip(b" \0") or b"0"
    if not digits.isdigit():  # int() accepts signs, and a negative size would make the reader go backwards
        raise ValueError("not a number")
    return int(digits, 8)


def _plain_name(tar: Tar, kind: bytes, raw: bytes) -> str:
    """Return the name without a leading "./"; "" for a folder, such as "./", which `tar -C folder .` writes first."""
    name = raw.decode("utf-8", errors="replace").removeprefix("./")
    if kind == b"5" and (name in ("", ".") or (tar.folders and is_plain_path(name.removesuffix("/")))):
        return ""
    if kind not in _FILE_KINDS:
        tar.refuse(f"member {name!r} is {_KINDS.get(kind, f'of the unknown kind {kind!r}')}, not a file: refused")
    if not is_plain_path(name) or ("/" in name and not tar.folders):
        tar.refuse(f"member {name!r} is not a plain file name: refused")
    return name


def is_plain_path(path: str) -> bool:
    """Whether a path is relative, without ".." and unprintable characters, and was valid UTF-8."""
    is_printable = path.isprintable() and "\N{REPLACEMENT CHARACTER}" not in path
    return is_printable and not any(part in _FOLDERS for part in path.split("/"))


@dataclass(frozen=True)
class _Extended:
    """Name and size of the next member, from an extension header."""

    name: bytes | None = None
    size: int | None = None


def _extend(tar: Tar, kind: bytes, offset: int, size: int, before: _Extended) -> _Extended:
    if size > _LONGEST_EXTENSION:
        tar.refuse(f"damaged at byte {offset - _BLOCK:,}: an extension header of {size:,} bytes")
    if tar.end is not None and offset + size > tar.end:
        _refuse_truncated(tar, offset + size)
    body = tar.read(size, offset)
    if kind == _LONG_NAME:
        return _Extended(body.rstrip(b"\0"), before.size)
    try:
        records = _pax_records(body)
        name, length = records.get(b"path", before.name), records.get(b"size")
        found = _Extended(name, before.size if length is None else int(length))
    except ValueError:
        tar.refuse(f"damaged at byte {offset:,}: a pax header cannot be read")
    sparse = any(key.startswith(b"GNU.sparse") for key in records)
    if sparse or (found.size or 0) < 0 or (kind == _PAX_OF_ALL and found != before):
        tar.refuse(f"a pax header at byte {offset:,} is not supported; create the archive with plain GNU tar")
    return found


def _pax_records(body: bytes) -> dict[bytes, bytes]:
    """Parse records of the form "length key=value\\n". Raises `ValueError` for others."""
    records, position = {}, 0
    while position < len(body):
        length = int(body[position : body.index(b" ", position)])
        record = body[position : position + length]
        if len(record) != length or not record.endswith(b"\n"):
            raise ValueError("a record without its end")
        key, _, value = record[:-1].partition(b" ")[2].partition(b"=")
        records[key] = value
        position += length
    return records
