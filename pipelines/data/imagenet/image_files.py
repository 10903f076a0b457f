"""Folders of image files that are built under a hidden name: one a class, which exists only when it is complete."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from pipelines.data.imagenet.index import Index
from pipelines.errors import AsgoError


def partial_folder(folder: Path) -> Path:
    """Where `folder` is built: `.<name>.partial` beside it."""
    return folder.with_name(f".{folder.name}.partial")


def make_partial_folder(folder: Path) -> None:
    """Make the hidden folder, or go on with the one that is there; a link that somebody has put there is removed."""
    partial = partial_folder(folder)
    if partial.is_symlink():
        partial.unlink()
    partial.mkdir(exist_ok=True)


def reopen(folder: Path) -> None:
    """Hide `folder` again, to complete it."""
    shutil.rmtree(partial_folder(folder), ignore_errors=True)
    folder.rename(partial_folder(folder))


def publish(folder: Path, expected: dict[str, int]) -> None:
    """Let `folder` appear. Raises `AsgoError` unless its hidden files have just the names and sizes `expected`."""
    partial = partial_folder(folder)
    there = sizes_in(partial)
    require_only(expected, partial, there)
    if there != expected:
        raise AsgoError(f"{partial}: another program changes it; start again when that has ended")
    partial.rename(folder)


def sizes_in(folder: Path) -> dict[str, int]:
    """The plain files of `folder`, and their sizes; others count as -1."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        return {
            entry.name: entry.stat(follow_symlinks=False).st_size if entry.is_file(follow_symlinks=False) else -1
            for entry in entries
        }
    return {}


def expected_sizes(images: Index) -> dict[str, int]:
    """The files that images of one class become, and their sizes."""
    return dict(zip((name.decode() for name in images.names.tolist()), images.sizes.tolist(), strict=True))


def require_only(expected: Iterable[str], folder: Path, there: dict[str, int]) -> None:
    """Raise `AsgoError` that names a file in `folder` that nobody expects."""
    for name in there.keys() - set(expected):
        raise AsgoError(f"{folder / name}: no part of the archive; remove it")


def write_image(path: Path, content: memoryview | bytes, parent: int | None = None) -> None:
    """Write a file from its beginning on, so that one with its full size is whole; `parent` is its folder, opened."""
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        descriptor = os.open(path if parent is None else path.name, flags, 0o666, dir_fd=parent)
        try:
            while content:
                content = content[os.write(descriptor, content) :]
        finally:
            os.close(descriptor)
    except OSError as error:
        error.filename = str(path)
        raise
