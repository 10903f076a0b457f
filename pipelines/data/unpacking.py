"""Files of bytes and lines, unpacked where they are compressed, in bounded memory."""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pipelines.errors import AsgoError
from pipelines.storage import naming

MAX_ROW_BYTES = 64 << 20
"""The longest line or row that is read: a few kilobytes of a compressed file can unpack to gigabytes."""

_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"PK\x03\x04": "zip",
}
_SUFFIXES = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
PACKED_SUFFIXES = tuple(_SUFFIXES)


def without_packing(name: str) -> str:
    """A file's name in lower case, without the ending that says how it is compressed."""
    name = name.lower()
    return next((name.removesuffix(suffix) for suffix in _SUFFIXES if name.endswith(suffix)), name)


@contextlib.contextmanager
def unpacked(file: Path) -> Iterator[BinaryIO]:
    """A file's bytes; gzip and zstd, known by their first bytes under any name, are unpacked on the way.

    Raises `AsgoError` for a damaged file, and one compressed in another way.
    """
    with naming_damage(file), file.open("rb") as raw, unpack(raw, str(file)) as stream:
        yield stream


@contextlib.contextmanager
def unpack(raw: BinaryIO, name: str) -> Iterator[BinaryIO]:
    """The same for an open file."""
    start = raw.read(max(map(len, _MAGIC)))
    raw.seek(0)
    by_name = next((kind for suffix, kind in _SUFFIXES.items() if name.lower().endswith(suffix)), None)
    kind = next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), by_name)
    if kind == "gzip":
        with io.BufferedReader(gzip.GzipFile(fileobj=raw)) as unpacking:
            yield unpacking
    elif kind == "zstd":
        import pyarrow

        with io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd")) as unpacking:
            yield unpacking
    elif kind is None:
        yield raw
    else:
        raise AsgoError(f"{name}: compressed by {kind}; unpack it first (gzip and zstd are read as they are)")


@contextlib.contextmanager
def naming_damage(file: Path) -> Iterator[None]:
    """Name the file in an error of the disk and of unpacking."""
    try:
        with naming(file):
            yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise AsgoError(f"{file}: damaged gzip file ({error})") from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise AsgoError(f"{file}: damaged zstd file ({error})") from None


def bounded_lines(stream: BinaryIO, where: str) -> Iterator[tuple[str, bytes]]:
    """Each line, and where it is. Raises `AsgoError` for one that is too long."""
    number = 0
    while line := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            raise too_long(f"{where}, line {number}")
        yield f"{where}, line {number}", line


def too_long(where: str) -> AsgoError:
    """The error for a line or a row that is too long."""
    return AsgoError(f"{where}: longer than {MAX_ROW_BYTES:,} bytes; cut it, or give its text as a file of its own")
