"""Lock the folder that a command prepares data in, and delete only the command's own files there."""

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
    """Create `folder` if needed and lock it; at the end, remove it again if it was created here and is empty.

    Raises `UsageError` if a file has that name, it cannot be created, or another process holds the lock.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: a file is in the way; choose another --out")
    is_new = not folder.exists()
    _create(folder)
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
    """Lock the name of `folder` with a hidden file beside it. Raises as `held_folder` does.

    The file is removed at the end. A killed process leaves the file, but not the lock.
    """
    _create(folder.parent)
    path = folder.with_name(f".{folder.name}.lock")
    descriptor = -1
    try:
        # Between open and lock, the previous holder may remove the file: its lock is then worth nothing. Open again.
        while not _is_at(path, descriptor):
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


def _create(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder}: this folder cannot be created ({error.strerror}); choose another one") from None


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether `path` still names the open file."""
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
    """Raise `UsageError` with every option that differs. `describe` gets the option's name and both values."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if names:
        changes = ", ".join(describe(name, before.get(name), now.get(name)) for name in names)
        raise UsageError(
            f"{folder}: {state}, made with {changes}; pass the same options, another --out, or --overwrite"
        )


def foreign_names(folder: Path) -> list[str]:
    """Return the names in `folder` that are not shards, their manifest or their journal, finished or not."""
    return sorted(path.name for path in folder.iterdir() if not _OURS.fullmatch(path.name))


def clear(folder: Path) -> None:
    """Remove shards, manifest and journal, and nothing else.

    The manifest goes first, so half a folder never looks complete. The journal goes last, so a folder left by a kill is
    still recognized.
    """
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == UNFINISHED):
        if _OURS.fullmatch(path.name):
            path.unlink()
