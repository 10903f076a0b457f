"""State of the folder that an image data set is prepared in: free, unfinished or complete; may it be overwritten."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from pipelines.data.holding import require_same_options
from pipelines.data.images.index import SPLITS, index_file, packed_file
from pipelines.data.images.manifest import (
    LAYOUT_OPTIONS,
    SOURCE,
    ImageManifest,
    Unfinished,
    holds_images,
    load_image_manifest,
    load_unfinished,
    save_unfinished,
)
from pipelines.data.manifest import MANIFEST, UNFINISHED
from pipelines.errors import UsageError

PARTS = ".parts"
"""Temporary folder with the indices of the source files that are done."""

_FILES = (MANIFEST, UNFINISHED, *map(index_file, SPLITS), *map(packed_file, SPLITS))
OURS = frozenset({*SPLITS, *_FILES, PARTS, *(f".{name}.partial" for name in _FILES)})
"""Names that a data folder may hold, complete or not."""


def finished_manifest(out: Path, new: Unfinished) -> ImageManifest | None:
    """Return the manifest if `out` is complete, or None. Raises `UsageError` if its options differ from `new`."""
    if not (out / MANIFEST).exists():
        return None
    manifest = load_image_manifest(out)
    require_same_options(out, "complete", manifest.recipe, new.recipe, _difference)
    remove_notes(out)
    return manifest


def remove_notes(out: Path) -> None:
    """Remove the temporary files, which are not needed once the manifest exists."""
    with contextlib.suppress(OSError):
        (out / UNFINISHED).unlink(missing_ok=True)
        shutil.rmtree(out / PARTS, ignore_errors=True)


def earlier_state(out: Path, new: Unfinished, overwrite: bool) -> Unfinished | None:
    """Return the state of an earlier call with the same options, or None. Changes nothing.

    Raises `UsageError` if the earlier call had other options, unless with `overwrite`, and if `out` holds files that
    are not part of an image data set.
    """
    state = None if overwrite else load_unfinished(out)
    if state is not None:
        require_same_options(out, "unfinished", state.recipe, new.recipe, _difference)
    else:
        _require_ours(out, new)
    return state


def begin_or_resume(out: Path, new: Unfinished, state: Unfinished | None) -> Unfinished:
    """Return `state`, that of an earlier call; or if it is None, clear `out` and return `new`."""
    if state is None:
        state = new
        save_unfinished(out, state)
    if not state.cleared:
        _clear(out)
        state = state.model_copy(update={"cleared": True})
        save_unfinished(out, state)
    return state


def _difference(name: str, before: str | None, now: str | None) -> str:
    return f"{_option(name, before)} and not {_option(name, now)}"


def _option(name: str, value: str | None) -> str:
    if name == "layout":
        return LAYOUT_OPTIONS.get(value or "", "neither --extract nor --no-extract")
    if name == SOURCE:
        return str(value)
    return f"--{name} {'none' if value is None else value}".rstrip()


def _require_ours(out: Path, new: Unfinished) -> None:
    # A kill during the first write of the state leaves only its partial file.
    content = {path.name for path in out.iterdir()} - {f".{UNFINISHED}.partial"}
    if not content:
        return
    foreign = sorted(content - OURS)
    if foreign or not holds_images(out):  # folders named train and val may be the user's own
        not_ours = f"`asgo data {new.importer}` did not create this folder"
        what = f"{foreign[0]} is not part of a prepared data set" if foreign else not_ours
        raise UsageError(f"{out}: {what}, so nothing is overwritten; choose another --out")


def _clear(out: Path) -> None:
    """Remove an earlier data set. The manifest goes first, so half a data set never looks complete."""
    (out / MANIFEST).unlink(missing_ok=True)
    for name in OURS - {UNFINISHED}:
        if (out / name).is_dir():
            shutil.rmtree(out / name)
        else:
            (out / name).unlink(missing_ok=True)
