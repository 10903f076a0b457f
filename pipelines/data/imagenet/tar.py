"""Find the members of a tar archive, and of the tar archives inside it, from their headers."""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

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


class Member(NamedTuple):
    """A file in an archive: its name, the offset of its content in the outermost archive, and its size in bytes."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Tar:
    """A tar archive between the offsets `start` and `end` of an open file; error messages use `name`."""

    descriptor: int
    start: int
    end: int
    name: str

    def inside(self, member: Member) -> Tar:
        """Return the member as an archive."""
        return Tar(self.descriptor, member.offset, member.offset + member.size, f"{self.name}: {member.name}")

    def refuse(self, problem: str) -> NoReturn:
        """Raise `AsgoError` with the archive's name."""
        raise AsgoError(f"{self.name}: {problem}")


@contextlib.contextmanager
def open_tar(path: Path) -> Iterator[Tar]:
    """Open the archive at `path`. Raises `AsgoError` if it cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise AsgoError(f"{path}: {error.strerror}") from None
    try:
        yield Tar(descriptor, 0, os.fstat(descriptor).st_size, str(path))
    finally:
        os.close(descriptor)


def read_members(tar: Tar) -> list[Member]:
    """Return the files of `tar` in the order of the archive.

    Only plain files with plain names are accepted. Raises `AsgoError` for a member that is a link, a device or a
    folder, a name with a slash (so every absolute path and every "..") or unprintable characters, two members with the
    same name, a truncated archive, and a file that is not a tar archive. Reads the long names of GNU tar and pax.
    """
    members: dict[str, Member] = {}
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
            if position + _BLOCK + size > tar.end:
                _refuse_truncated(tar, position + _BLOCK + size)
            plain = _plain_name(tar, kind, name.partition(b"\0")[0])
            if plain in members:
                tar.refuse(f"two members are named {plain!r}")
            if plain:
                members[plain] = Member(plain, position + _BLOCK, size)
            extended = None
        position += _BLOCK + -(-size // _BLOCK) * _BLOCK
    return list(members.values())


def _read_header(tar: Tar, position: int) -> bytes:
    if position + _BLOCK > tar.end:
        _refuse_truncated(tar, position + _BLOCK)
    header = os.pread(tar.descriptor, _BLOCK, position)
    if len(header) < _BLOCK:
        tar.refuse("was truncated while it was read")
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
    """Return the name without a leading "./"; "" for the folder "./" itself, which `tar -C folder .` writes first."""
    name = raw.decode("utf-8", errors="replace").removeprefix("./")
    if kind == b"5" and name in ("", "."):
        return ""
    if kind not in _FILE_KINDS:
        tar.refuse(f"member {name!r} is {_KINDS.get(kind, f'of the unknown kind {kind!r}')}, not a file: refused")
    if "/" in name or name in _FOLDERS or not name.isprintable() or "\N{REPLACEMENT CHARACTER}" in name:
        tar.refuse(f"member {name!r} is not a plain file name: refused")
    return name


@dataclass(frozen=True)
class _Extended:
    """Name and size of the next member, from an extension header."""

    name: bytes | None = None
    size: int | None = None


def _extend(tar: Tar, kind: bytes, offset: int, size: int, before: _Extended) -> _Extended:
    if size > _LONGEST_EXTENSION:
        tar.refuse(f"damaged at byte {offset - _BLOCK:,}: an extension header of {size:,} bytes")
    if offset + size > tar.end:
        _refuse_truncated(tar, offset + size)
    body = os.pread(tar.descriptor, size, offset)
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
