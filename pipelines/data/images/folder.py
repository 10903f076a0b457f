"""The folder that a data set of images is made in: free, unfinished or complete, and whether it may be overwritten."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from pipelines.data.holding import require_same_options
from pipelines.data.images.index import SPLITS, index_file, packed_file
from pipelines.data.images.manifest import (
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
"""A folder that is there until the work is done, with the indices of what is done."""

_FILES = (MANIFEST, UNFINISHED, *map(index_file, SPLITS), *map(packed_file, SPLITS))
OURS = frozenset({*SPLITS, *_FILES, PARTS, *(f".{name}.partial" for name in _FILES)})
"""What a folder may hold, complete or not."""


def finished_manifest(out: Path, new: Unfinished) -> ImageManifest | None:
    """The manifest if `out` is complete. Raises `UsageError` when it was made with other options than `new`."""
    if not (out / MANIFEST).exists():
        return None
    manifest = load_image_manifest(out)
    require_same_options(out, "complete", manifest.recipe, new.recipe, _difference)
    remove_notes(out)
    return manifest


def remove_notes(out: Path) -> None:
    """Remove what is of no use any more when the manifest is there."""
    with contextlib.suppress(OSError):
        (out / UNFINISHED).unlink(missing_ok=True)
        shutil.rmtree(out / PARTS, ignore_errors=True)


def begin_or_resume(out: Path, new: Unfinished, overwrite: bool) -> Unfinished:
    """The state that an earlier call with the same options left, or `new`, of which `out` then holds nothing else.

    Raises `UsageError` when the earlier call had other options or `out` holds something else, unless `overwrite` is
    given and everything there is of a data set of images.
    """
    state = None if overwrite else load_unfinished(out)
    if state is not None:
        require_same_options(out, "unfinished", state.recipe, new.recipe, _difference)
    else:
        _require_free(out, new, overwrite)
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
        return "--no-extract" if value == "packed" else "--extract"
    return f"--{name} {value or 'none'}"


def _require_free(out: Path, new: Unfinished, overwrite: bool) -> None:
    content = {path.name for path in out.iterdir()} - {f".{UNFINISHED}.partial"}  # the first one, never finished
    if not content:
        return
    if not overwrite:
        raise UsageError(f"{out}: this folder is not empty; choose another --out, or pass --overwrite")
    foreign = sorted(content - OURS)
    if foreign or not holds_images(out):  # folders named train and val could be anybody's
        made = f"`asgo data {new.importer}` did not make it"
        what = f"{foreign[0]} is no part of a prepared {new.dataset}" if foreign else made
        raise UsageError(f"{out}: {what}, so nothing is overwritten; choose another --out")


def _clear(out: Path) -> None:
    """Remove an earlier data set: the manifest first, so that no half of it is taken for good."""
    (out / MANIFEST).unlink(missing_ok=True)
    for name in OURS - {UNFINISHED}:
        if (out / name).is_dir():
            shutil.rmtree(out / name)
        else:
            (out / name).unlink(missing_ok=True)
