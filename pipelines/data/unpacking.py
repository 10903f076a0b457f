"""Read files of bytes and lines, decompressed if needed, in bounded memory."""

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
"""Maximum size of a line or row: a few kilobytes of a compressed file can decompress to gigabytes."""

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
    """Return a file name in lower case, without the suffix of its compression."""
    name = name.lower()
    return next((name.removesuffix(suffix) for suffix in _SUFFIXES if name.endswith(suffix)), name)


@contextlib.contextmanager
def unpacked(file: Path) -> Iterator[BinaryIO]:
    """Open a file for reading; decompress gzip and zstd, recognized by their first bytes under any name.

    Raises `AsgoError` for a damaged file and for other compressions.
    """
    with naming_damage(file), file.open("rb") as raw, unpack(raw, str(file)) as stream:
        yield stream


@contextlib.contextmanager
def unpack(raw: BinaryIO, name: str) -> Iterator[BinaryIO]:
    """Decompress an open file as `unpacked` does."""
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
        raise AsgoError(f"{name}: compressed with {kind}; decompress it first (gzip and zstd can be read directly)")


@contextlib.contextmanager
def naming_damage(file: Path) -> Iterator[None]:
    """Add the file's name to errors of the disk and of decompression."""
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
    """Yield the location and the bytes of each line. Raises `AsgoError` for a line that is too long."""
    number = 0
    while line := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            raise too_long(f"{where}, line {number}")
        yield f"{where}, line {number}", line


def too_long(where: str) -> AsgoError:
    """Return the error for a line or row that is too long."""
    return AsgoError(f"{where}: longer than {MAX_ROW_BYTES:,} bytes; split it, or pass its text as a separate file")
