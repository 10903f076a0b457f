"""The folder that a corpus is prepared in: free, unfinished or complete."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipelines.data.corpus.journal import Journal, load_journal
from pipelines.data.holding import foreign_names
from pipelines.data.manifest import MANIFEST, UNFINISHED, Manifest, load_manifest
from pipelines.errors import UsageError

Recipe = Mapping[str, str | int]


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
    foreign = foreign_names(folder)
    if foreign:
        raise UsageError(
            f"{folder}: {foreign[0]} is no part of a corpus, so nothing is overwritten; choose another --out"
        )


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
