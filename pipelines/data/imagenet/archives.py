"""The three archives that ILSVRC2012 comes in, and whether a file is one of them."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pipelines.errors import AsgoError

Progress = Callable[[str, int, int], None]
"""Called with (phase, bytes done, bytes in all), often; what it raises ends the work."""


@dataclass(frozen=True)
class Archive:
    """An archive's file name, its length if that is known, and its hexadecimal MD5."""

    file: str
    bytes: int | None
    md5: str


ARCHIVES: Mapping[str, Archive] = {
    "train": Archive("ILSVRC2012_img_train.tar", 147_897_477_120, "1d675b47d978889d74fa0da5fadfb00e"),
    "val": Archive("ILSVRC2012_img_val.tar", 6_744_924_160, "29b22e2961454d5413ddabcf34fc5622"),
    "devkit": Archive("ILSVRC2012_devkit_t12.tar.gz", None, "fa75699e90414af021442c21a62c3abf"),
}
"""The official ones."""

MD5SUMS = "md5sums.txt"
"""Beside the archives, in the format of `md5sum`: what they must be where they are not the official ones."""

_MD5SUM_LINE = re.compile(r"([0-9a-fA-F]{32}) [ *](?:\./)?(.+)")
_BLOCK = 4 << 20


def parse_md5sums(text: str, origin: str) -> dict[str, Archive]:
    """The archives as an `md5sums.txt` describes them, by the keys of `ARCHIVES`; lines of other files are passed over.

    Raises `AsgoError` that names `origin` when a line is malformed or an archive is not listed.
    """
    digests = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        match = _MD5SUM_LINE.fullmatch(line.strip())
        if match is None:
            raise AsgoError(f"{origin}: line {number} is not as md5sum writes it (a digest, two spaces, a file's name)")
        digests[match[2]] = match[1].lower()
    for archive in ARCHIVES.values():
        if archive.file not in digests:
            raise AsgoError(f"{origin}: no line for {archive.file}")
    return {key: replace(each, bytes=None, md5=digests[each.file]) for key, each in ARCHIVES.items()}


def expected_archives(folder: Path) -> Mapping[str, Archive]:
    """What the archives in `folder` must be: as its `md5sums.txt` says, or else the official ones.

    Raises `AsgoError` when `md5sums.txt` cannot be read or is malformed.
    """
    path = folder / MD5SUMS
    try:
        return parse_md5sums(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        return ARCHIVES
    except (OSError, UnicodeDecodeError) as error:
        raise AsgoError(f"{path}: cannot be read ({error})") from None


def check_archive(path: Path, archive: Archive, progress: Progress) -> None:
    """Read `path` through. Raises `AsgoError` unless it has the length and the MD5 of `archive`."""
    remedy = f"download it again, or list it in {path.parent / MD5SUMS} if it is another edition"
    try:
        size = path.stat().st_size
        if archive.bytes is not None and size != archive.bytes:
            raise AsgoError(f"{path}: {size:,} bytes long, not {archive.bytes:,}; {remedy}")
        md5 = digest_of(path, "md5", lambda done, total: progress(f"checking {archive.file}", done, total))
    except OSError as error:
        raise AsgoError(f"{path}: {error.strerror}") from None
    if md5 != archive.md5:
        raise AsgoError(f"{path}: its MD5 is {md5}, not {archive.md5}; {remedy}")


def digest_of(path: Path, algorithm: str, tell: Callable[[int, int], None]) -> str:
    """The hexadecimal digest of a file; `tell` is called often with (bytes done, bytes in all). Raises `OSError`."""
    digest, done, block = hashlib.new(algorithm, usedforsecurity=False), 0, memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        while count := file.readinto(block):
            digest.update(block[:count])
            done += count
            tell(done, size)
    return digest.hexdigest()
