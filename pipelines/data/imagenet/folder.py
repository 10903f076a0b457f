"""The folder that ImageNet is prepared in: free, unfinished or complete, and whether it may be overwritten."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from pipelines.data.imagenet.index import SPLITS, index_file, packed_file
from pipelines.data.imagenet.manifest import (
    ImagenetManifest,
    Recipe,
    Unfinished,
    holds_imagenet,
    load_imagenet_manifest,
    load_unfinished,
    save_unfinished,
)
from pipelines.data.manifest import MANIFEST, UNFINISHED
from pipelines.errors import UsageError

PARTS = ".parts"
"""A folder that is there until the work is done, with the indices of what is done."""

_FILES = (MANIFEST, UNFINISHED, *map(index_file, SPLITS), *map(packed_file, SPLITS))
OURS = frozenset({*SPLITS, *_FILES, PARTS, *(f".{name}.partial" for name in _FILES)})
"""What a folder may hold, complete or not."""


def finished_manifest(out: Path, recipe: Recipe) -> ImagenetManifest | None:
    """The manifest if `out` is complete. Raises `UsageError` when it was made with other options."""
    if not (out / MANIFEST).exists():
        return None
    manifest = load_imagenet_manifest(out)
    _require_same(out, "complete", manifest.recipe, recipe)
    remove_notes(out)
    return manifest


def remove_notes(out: Path) -> None:
    """Remove what is of no use any more when the manifest is there."""
    with contextlib.suppress(OSError):
        (out / UNFINISHED).unlink(missing_ok=True)
        shutil.rmtree(out / PARTS, ignore_errors=True)


def begin_or_go_on(out: Path, recipe: Recipe, overwrite: bool) -> Unfinished:
    """The state that an earlier call with the same options left, or a new one, of which `out` then holds nothing else.

    Raises `UsageError` when the earlier call had other options or `out` holds something else, unless `overwrite` is
    given and everything there is of a prepared ImageNet.
    """
    state = None if overwrite else load_unfinished(out)
    if state is not None:
        _require_same(out, "unfinished", state.recipe, recipe)
    else:
        _require_free(out, overwrite)
        state = Unfinished(recipe=dict(recipe))
        save_unfinished(out, state)
    if not state.cleared:
        _clear(out)
        state = state.model_copy(update={"cleared": True})
        save_unfinished(out, state)
    return state


def _require_same(out: Path, what: str, before: Recipe, now: Recipe) -> None:
    """Name every option that differs."""
    changes = ", ".join(
        f"{_option(name, before.get(name, ''))} and not {_option(name, value)}"
        for name, value in now.items()
        if before.get(name) != value
    )
    if changes:
        raise UsageError(f"{out}: {what}, made with {changes}; give the same options, another --out, or --overwrite")


def _option(name: str, value: str) -> str:
    if name == "layout":
        return "--no-extract" if value == "packed" else "--extract"
    return f"--{name} {value}"


def _require_free(out: Path, overwrite: bool) -> None:
    content = {path.name for path in out.iterdir()} - {f".{UNFINISHED}.partial"}  # the first one, never finished
    if not content:
        return
    if not overwrite:
        raise UsageError(f"{out}: this folder is not empty; choose another --out, or pass --overwrite")
    foreign = sorted(content - OURS)
    if foreign or not holds_imagenet(out):  # folders named train and val could be anybody's
        what = f"{foreign[0]} is no part of a prepared ImageNet" if foreign else "`asgo data imagenet` did not make it"
        raise UsageError(f"{out}: {what}, so nothing is overwritten; choose another --out")


def _clear(out: Path) -> None:
    """Remove an earlier ImageNet: the manifest first, so that no half of it is taken for good."""
    (out / MANIFEST).unlink(missing_ok=True)
    for name in OURS - {UNFINISHED}:
        if (out / name).is_dir():
            shutil.rmtree(out / name)
        else:
            (out / name).unlink(missing_ok=True)
