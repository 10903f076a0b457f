"""Writing to disk so that a kill, at any moment, leaves either the old state or the new one."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename inside it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Flush a file's contents to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a whole file under a hidden name, then rename it to `path`."""
    staged = path.with_name(f".{path.name}.partial")
    try:
        with staged.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            staged.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def staging_path(target: Path) -> Path:
    """The hidden sibling in which `staged_folder` builds `target`."""
    return target.with_name(f".{target.name}.partial")


@contextlib.contextmanager
def staged_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Build a folder in a hidden sibling; on success every file is flushed and the folder renamed to `target`.

    On an error nothing is left. With `replace`, an existing `target` is exchanged for the new folder as a whole;
    without it, an existing non-empty `target` raises `OSError` at the end.
    """
    staged = staging_path(target)
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        yield staged
        for path in staged.rglob("*"):
            sync_folder(path) if path.is_dir() else sync_file(path)
        sync_folder(staged)
        if replace and target.exists():
            _exchange(staged, target)
        else:
            staged.rename(target)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    sync_folder(target.parent)


def _exchange(staged: Path, target: Path) -> None:
    outgoing = target.with_name(f".{target.name}.outgoing")
    shutil.rmtree(outgoing, ignore_errors=True)
    target.rename(outgoing)
    staged.rename(target)
    shutil.rmtree(outgoing)
