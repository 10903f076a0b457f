"""Small folders and archives of real images."""

from __future__ import annotations

import functools
import gzip
import io
import stat
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

Files = dict[str, bytes]
"""Content by path."""


@functools.cache
def picture(seed: int, size: tuple[int, int] = (24, 16), kind: str = "PNG", mode: str = "RGB") -> bytes:
    """Return an image of `size` (width, height) whose pixels differ with the seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind)
    return file.getvalue()


def split_files(
    train: int = 4, val: int = 2, size: tuple[int, int] = (24, 16), classes: tuple[str, ...] = ("cat", "dog")
) -> Files:
    """Return `train/CLASS/N.png` and `val/CLASS/N.png`."""
    counts = {"train": train, "val": val}
    return {
        f"{split}/{name}/{number}.png": picture(100 * label + 10 * place + number, size)
        for place, (split, count) in enumerate(counts.items())
        for label, name in enumerate(classes)
        for number in range(count)
    }


def class_files(counts: Mapping[str, int], size: tuple[int, int] = (24, 16)) -> Files:
    """Return `CLASS/CLASS_N.png`, of each class so many."""
    return {
        f"{name}/{name}_{number}.png": picture(1000 * label + number, size)
        for label, (name, count) in enumerate(counts.items())
        for number in range(count)
    }


def write_folder(folder: Path, files: Files) -> Path:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def write_tar(path: Path, files: Files, *more: tarfile.TarInfo) -> Path:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(content), 1.5
            tar.addfile(entry, io.BytesIO(content))
        for entry in more:
            tar.addfile(entry)
    content = buffer.getvalue()
    path.write_bytes(gzip.compress(content) if path.suffix in (".gz", ".tgz") else content)
    return path


def write_zip(path: Path, files: Files, *, method: int = zipfile.ZIP_DEFLATED, link: str = "") -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        if link:
            entry = zipfile.ZipInfo(link)
            entry.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(entry, "/etc/passwd")
    return path


def write_source(tmp_path: Path, kind: str, files: Files) -> Path:
    """Write the files as a folder, tar, tgz, zip or zip without compression; return its path."""
    if kind == "folder":
        return write_folder(tmp_path / "photos", files)
    nested = {f"photos/{name}": content for name, content in files.items()}
    if kind in ("tar", "tgz"):
        return write_tar(tmp_path / f"photos.{kind}", nested)
    method = zipfile.ZIP_STORED if kind == "stored zip" else zipfile.ZIP_DEFLATED
    return write_zip(tmp_path / "photos.zip", nested, method=method)
