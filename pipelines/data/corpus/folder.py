"""The folder that a corpus is prepared in: free, unfinished or complete, and one process's at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from pipelines.data.corpus.journal import Journal, load_journal
from pipelines.data.manifest import MANIFEST, UNFINISHED, Manifest, load_manifest
from pipelines.errors import UsageError

Recipe = Mapping[str, str | int]
_OURS = re.compile(rf"\.?(shard_\d{{6}}\.bin|{re.escape(MANIFEST)}|{re.escape(UNFINISHED)})(\.partial)?")


@contextlib.contextmanager
def held_folder(folder: Path) -> Iterator[None]:
    """Make `folder` and keep other processes out of it; it is taken away again if it stays empty.

    Raises `UsageError` when a file is in the way or another process is at work.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: a file is in the way; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(folder, descriptor)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                folder.rmdir()
    finally:
        os.close(descriptor)


def _lock(folder: Path, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"{folder}: another process is preparing data in this folder") from None
    except OSError:
        pass  # a file system without locks, as clusters have them


def finished_manifest(folder: Path, recipe: Recipe) -> Manifest | None:
    """The manifest if `folder` is complete. Raises `UsageError` when it was made with other options."""
    if not (folder / MANIFEST).exists():
        return None
    manifest = load_manifest(folder)
    _require_same(folder, "complete", manifest.recipe, recipe)
    return manifest


def unfinished_journal(folder: Path, recipe: Recipe) -> Journal | None:
    """The journal if the work in `folder` can go on.

    Raises `UsageError` when it was begun with other options, or the folder holds something else.
    """
    journal = load_journal(folder)
    if journal is not None:
        _require_same(folder, "unfinished", journal.recipe, recipe)
    elif any(path.name != f".{UNFINISHED}.partial" for path in folder.iterdir()):  # the first one, never finished
        raise UsageError(f"{folder}: this folder is not empty; choose another --out, or pass --overwrite")
    return journal


def require_replaceable(folder: Path) -> None:
    """Raise `UsageError` if `folder` holds anything but shards, their manifest and their journal."""
    foreign = sorted(path.name for path in folder.iterdir() if not _OURS.fullmatch(path.name))
    if foreign:
        raise UsageError(
            f"{folder}: {foreign[0]} is no part of a corpus, so nothing is overwritten; choose another --out"
        )


def clear(folder: Path) -> None:
    """Remove what is in `folder`: the manifest and the journal first, so that no half of it is taken for good."""
    for name in (MANIFEST, UNFINISHED):
        (folder / name).unlink(missing_ok=True)
    for path in folder.iterdir():
        path.unlink()


def _require_same(folder: Path, state: str, before: Recipe, now: Recipe) -> None:
    """Name every option that differs."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if names:
        changes = ", ".join(f"{_flag(name)} {_shown(before, name)} and not {_shown(now, name)}" for name in names)
        raise UsageError(
            f"{folder}: {state}, made with {changes}; give the same options, another --out, or --overwrite"
        )


def _flag(name: str) -> str:
    return name if name == "corpus" else f"--{name.replace('_', '-')}"


def _shown(recipe: Recipe, name: str) -> str:
    value = recipe.get(name)
    return "none" if value is None else f"{value:,}" if isinstance(value, int) else value
