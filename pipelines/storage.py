"""Writing to disk so that a kill, at any moment, leaves either the old state or the new one."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipelines.errors import UsageError


def parse_json(text: str | bytes) -> Any:
    """As `json.loads`, for files of strangers: lists in lists without end are a `ValueError` too."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def csv_cell(value: object) -> object:
    """A cell of a CSV file: text that a spreadsheet would carry out begins with an apostrophe; numbers stay.

    Names of runs and labels may be a stranger's. Spreadsheets take a text that begins with = + - @, a tab or a carriage
    return for a formula.
    """
    if not isinstance(value, str):
        return value
    return f"'{printable(value)}" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else printable(value)


def printable(text: str) -> str:
    """Text of a stranger for people to read: a terminal is not to obey it. Control characters become their numbers."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 digest of a file."""
    with naming(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk, so that it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_file(path: Path) -> None:
    """Raise `UsageError` for a file where a folder is expected; the message names the folder that holds it."""
    if path.is_file():
        raise UsageError(f"{path}: this is a file; give the folder that it is in: {path.parent}")


def make_folder(path: Path) -> None:
    """Make a folder and what is missing above it, and flush each new name to disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        with contextlib.suppress(PermissionError):  # a parent that can be written to and not be read
            sync(folder.parent)


def write_output(path: Path, content: bytes) -> None:
    """Write a file to where a user points, as a whole or not at all; make the folder if need be.

    A link stays, and the file that it leads to is replaced. What cannot be replaced is written to: a device, a FIFO,
    and the file that stdout or stderr already goes to, as `/dev/stdout`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = _stream(path)
    if stream is None:
        write_atomically(Path(os.path.realpath(path)), content)
        return
    with naming(path), open(stream, "wb", closefd=not isinstance(stream, int)) as file:
        file.write(content)


def _stream(path: Path) -> Path | int | None:
    """What to open where a file cannot be replaced: the path, or the number of an open file; None where it can be."""
    try:
        there = path.stat()
    except OSError:
        return None
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if os.path.samestat(there, os.fstat(descriptor)):
                return descriptor
    return None if stat.S_ISREG(there.st_mode) or stat.S_ISDIR(there.st_mode) else path


def write_atomically(path: Path, content: bytes) -> None:
    """Write a whole file under a hidden name, then rename it to `path`; a link of either name is not followed."""
    staged = _sibling(path, "partial")
    try:
        with naming(path):
            staged.unlink(missing_ok=True)
            with staged.open("xb") as file:
                file.write(content)
            sync(staged)
            staged.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            staged.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextlib.contextmanager
def staged_folder(
    target: Path, *, replace: bool = False, parents: bool = True, before_rename: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """Build a folder in a hidden sibling; on success every file is flushed and the folder renamed to `target`.

    On an error, also one of `before_rename`, nothing is left. With `replace`, an existing `target` is exchanged for the
    new folder as a whole; without it, an existing non-empty `target` raises `OSError` at the end. `parents` makes what
    is missing above `target`.
    """
    staged, outgoing = _sibling(target, "partial"), _sibling(target, "outgoing")
    undo_exchange(outgoing, target)
    for leftover in (staged, outgoing):
        with contextlib.suppress(OSError):
            leftover.unlink(missing_ok=True)  # a link that somebody has put there
        shutil.rmtree(leftover, ignore_errors=True)
    staged.mkdir(parents=parents)
    try:
        yield staged
        readable = staged.stat().st_mode & 0o666
        for path in staged.rglob("*"):
            if path.is_file():
                path.chmod(readable)  # safetensors lets nobody but its writer read a file
            sync(path)
        sync(staged)
        before_rename()
        if replace and target.exists():
            target.rename(outgoing)
        staged.rename(target)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        with contextlib.suppress(OSError):  # the first error is the one to tell; the next start tries again
            undo_exchange(outgoing, target)
        raise
    sync(target.parent)
    shutil.rmtree(outgoing, ignore_errors=True)


def refusing_links(path: str, flags: int) -> int:
    """An `opener` for files of ours that are written further: a link of that name leads to another file."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def undo_exchange(outgoing: Path, target: Path) -> None:
    """Bring the old folder back where an exchange ended between its two renames."""
    if outgoing.exists() and not target.exists():
        outgoing.rename(target)


def _sibling(target: Path, state: str) -> Path:
    if not target.name:  # of the root, and of `.`
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    return target.with_name(f".{target.name}.{state}")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file in an error of the disk: the system names none for an open file, or only its hidden sibling."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise
