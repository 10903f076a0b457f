"""The folder that a command prepares data in: one process's at a time, and what may be deleted in it."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from pipelines.data.manifest import MANIFEST, UNFINISHED
from pipelines.errors import UsageError
from pipelines.locking import try_lock
from pipelines.storage import naming

T = TypeVar("T")
_OURS = re.compile(rf"\.?(shard_\d{{6}}\.bin|{re.escape(MANIFEST)}|{re.escape(UNFINISHED)})(\.partial)?")


@contextlib.contextmanager
def held_folder(folder: Path) -> Iterator[None]:
    """Make `folder` and keep other processes out of it; if it was made and stays empty, it is taken away again.

    Raises `UsageError` when a file is in the way or another process is at work.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: a file is in the way; choose another --out")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(folder, descriptor)
        try:
            yield
        finally:
            if is_new:
                with contextlib.suppress(OSError):
                    folder.rmdir()
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def held_name(folder: Path) -> Iterator[None]:
    """Keep other processes from making `folder`, by a hidden file beside it; raises as `held_folder` does.

    The file goes away at the end. A process that is killed leaves it, but not its lock.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.lock")
    descriptor = -1
    try:
        while not _is_at(path, descriptor):  # the process that held the last file took it away
            if descriptor >= 0:
                os.close(descriptor)
            with naming(folder):
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            _lock(folder, descriptor)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file is the one at `path`."""
    try:
        return descriptor >= 0 and os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _lock(folder: Path, descriptor: int) -> None:
    if not try_lock(descriptor):
        raise UsageError(f"{folder}: another process is preparing data in this folder")


def require_same_options(
    folder: Path,
    state: str,
    before: Mapping[str, T],
    now: Mapping[str, T],
    describe: Callable[[str, T | None, T | None], str],
) -> None:
    """Raise `UsageError` that names every option that differs; `describe` gets its name and both values."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if names:
        changes = ", ".join(describe(name, before.get(name), now.get(name)) for name in names)
        raise UsageError(
            f"{folder}: {state}, made with {changes}; give the same options, another --out, or --overwrite"
        )


def foreign_names(folder: Path) -> list[str]:
    """What `folder` holds besides shards, their manifest and their journal, finished or not."""
    return sorted(path.name for path in folder.iterdir() if not _OURS.fullmatch(path.name))


def clear(folder: Path) -> None:
    """Remove shards, manifest and journal, and nothing else.

    The manifest goes first, so that no half of it is taken for good, and the journal last, so that what is left by a
    kill is still known as such.
    """
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == UNFINISHED):
        if _OURS.fullmatch(path.name):
            path.unlink()
