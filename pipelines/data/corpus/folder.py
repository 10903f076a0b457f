"""The folder that a corpus is prepared in: free, unfinished or complete."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipelines.data.corpus.journal import Journal, load_journal
from pipelines.data.holding import foreign_names, require_same_options
from pipelines.data.manifest import MANIFEST, UNFINISHED, Manifest, load_manifest
from pipelines.errors import UsageError

Recipe = Mapping[str, str | int]


def finished_manifest(folder: Path, recipe: Recipe) -> Manifest | None:
    """The manifest if `folder` is complete. Raises `UsageError` when it was made with other options."""
    if not (folder / MANIFEST).exists():
        return None
    manifest = load_manifest(folder)
    require_same_options(folder, "complete", manifest.recipe, recipe, _difference)
    return manifest


def unfinished_journal(folder: Path, recipe: Recipe) -> Journal | None:
    """The journal if the work in `folder` can go on.

    Raises `UsageError` when it was begun with other options, or the folder holds something else.
    """
    journal = load_journal(folder)
    if journal is not None:
        require_same_options(folder, "unfinished", journal.recipe, recipe, _difference)
    elif any(path.name != f".{UNFINISHED}.partial" for path in folder.iterdir()):  # the first one, never finished
        raise UsageError(f"{folder}: this folder is not empty; choose another --out, or pass --overwrite")
    return journal


def require_replaceable(folder: Path) -> None:
    """Raise `UsageError` if `folder` holds anything but shards, their manifest and their journal."""
    foreign = foreign_names(folder)
    if foreign:
        raise UsageError(
            f"{folder}: {foreign[0]} is no part of a corpus, so nothing is overwritten; choose another --out"
        )


def _difference(name: str, before: str | int | None, now: str | int | None) -> str:
    flag = name if name == "corpus" else f"--{name.replace('_', '-')}"
    return f"{flag} {_shown(before)} and not {_shown(now)}"


def _shown(value: str | int | None) -> str:
    return "none" if value is None else f"{value:,}" if isinstance(value, int) else value
