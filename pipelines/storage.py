"""Atomic writes: a kill at any moment leaves either the old content or the new one."""

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
    """Parse JSON from an untrusted file. Like `json.loads`, but raises `ValueError` if it is nested too deep."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def csv_cell(value: object) -> object:
    """Return a value as a CSV cell that no spreadsheet evaluates: an apostrophe precedes text like a formula.

    Names of runs and labels are untrusted. Spreadsheets evaluate text that begins with = + - @, a tab or a carriage
    return.
    """
    if not isinstance(value, str):
        return value
    return f"'{printable(value)}" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else printable(value)


def printable(text: str) -> str:
    """Return untrusted text without terminal control sequences: unprintable characters become escapes such as \\x1b."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def sha256_of(path: Path) -> str:
    """Return the hexadecimal SHA-256 digest of a file."""
    with naming(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk (fsync)."""
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


def walk_once(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Walk like `os.walk`, following links, but enter each folder once: a link to a parent would make it endless."""
    entered: set[Path] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        resolved = Path(place).resolve()
        if resolved in entered:
            folders.clear()
            continue
        entered.add(resolved)
        yield Path(place), folders, files


def make_folder(path: Path) -> None:
    """Make a folder and its missing parents, and flush each new entry to disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        with contextlib.suppress(PermissionError):  # a parent that is writable but not readable
            sync(folder.parent)


def write_output(path: Path, content: bytes) -> None:
    """Write a file to a user's path, atomically; make its folder if it is missing.

    A symbolic link stays, and its target is replaced. A device, a FIFO, and the file that stdout or stderr goes to
    (`/dev/stdout`) cannot be replaced; they are opened and written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = _stream(path)
    if stream is None:
        write_atomically(Path(os.path.realpath(path)), content)
        return
    with naming(path), open(stream, "wb", closefd=not isinstance(stream, int)) as file:
        file.write(content)


def _stream(path: Path) -> Path | int | None:
    """Return the path or file descriptor to open if the file cannot be replaced; None if it can."""
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
    """Write a hidden file, then rename it to `path`. Does not follow a symbolic link of either name."""
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
    """Context manager that yields a hidden sibling folder; on success flushes its files and renames it to `target`.

    On an error, also one of `before_rename`, removes the hidden folder. With `replace`, the new folder replaces an
    existing `target` as a whole; without it, an existing non-empty `target` raises `OSError` at the end. `parents`
    makes missing parents of `target`.
    """
    staged, outgoing = _sibling(target, "partial"), _sibling(target, "outgoing")
    undo_exchange(outgoing, target)
    for leftover in (staged, outgoing):
        with contextlib.suppress(OSError):
            leftover.unlink(missing_ok=True)  # a link, which `rmtree` does not remove
        shutil.rmtree(leftover, ignore_errors=True)
    staged.mkdir(parents=parents)
    try:
        yield staged
        readable = staged.stat().st_mode & 0o666
        for path in staged.rglob("*"):
            if path.is_file():
                path.chmod(readable)  # safetensors writes files that only their owner can read
            sync(path)
        sync(staged)
        before_rename()
        if replace and target.exists():
            target.rename(outgoing)
        staged.rename(target)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        with contextlib.suppress(OSError):  # the first error is the one to report; the next call repeats this
            undo_exchange(outgoing, target)
        raise
    sync(target.parent)
    shutil.rmtree(outgoing, ignore_errors=True)


def refusing_links(path: str, flags: int) -> int:
    """`opener` for files that the program appends to: fails on a symbolic link, which could point to another file."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def undo_exchange(outgoing: Path, target: Path) -> None:
    """Rename the old folder back if `staged_folder` ended between its two renames."""
    if outgoing.exists() and not target.exists():
        outgoing.rename(target)


def _sibling(target: Path, state: str) -> Path:
    if not target.name:  # `/` and `.`
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    return target.with_name(f".{target.name}.{state}")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Set the filename of an `OSError` to `path`: it has none for an open file, or that of the hidden sibling."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise
