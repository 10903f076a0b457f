"""A data set of images from where it comes, checked, into a folder to train from."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from pipelines.data.holding import held_folder
from pipelines.data.images.extract import flush_to_disk
from pipelines.data.images.folder import begin_or_resume, finished_manifest, remove_notes
from pipelines.data.images.index import SPLITS, ImageClass, Index, fingerprint, index_file
from pipelines.data.images.manifest import (
    ClassEntry,
    ImageManifest,
    Layout,
    Piece,
    SourceFile,
    Unfinished,
    save_unfinished,
    write_image_manifest,
)
from pipelines.data.progress import Progress
from pipelines.errors import AsgoError, RunInterrupted, UsageError
from pipelines.stopping import StopRequest, stop_on_signals
from pipelines.storage import sha256_of

WAITING = "waiting for the disk"
"""The last phase that is reported, when all images are written."""

_DISK_BLOCK = 4096


@dataclass(frozen=True)
class Contents:
    """What an importer made: the classes, sorted by their ids, and the index of each split.

    Of packed images, either `pieces` says what the files consist of, or `containers` names the source file of each
    split.
    """

    classes: tuple[ImageClass, ...]
    indices: Mapping[str, Index]
    pieces: tuple[Piece, ...] = ()
    containers: dict[str, str] = field(default_factory=dict)


class ImageImporter(Protocol):
    """What `import_images` asks of each place that images may come from."""

    dataset: str
    """The data set's name, for people."""
    command: str
    """The subcommand of `asgo data` that imports it."""
    options: dict[str, str]
    """The options of that command that decide what a folder holds, besides the layout."""
    folder: Path
    """Where the source files are."""

    @property
    def revision(self) -> str | None:
        """The commit of the source, if known."""

    def find(self) -> Sequence[Path]:
        """All source files. Raises `UsageError` or `AsgoError` that names what is missing, and how to get it."""

    def expected(self, path: Path) -> str | None:
        """The digest, such as "md5:…", that a file must have, if that is known."""

    def check(self, path: Path, report: Progress) -> str:
        """Read a file through for its digest. Raises `AsgoError` when it is another than expected."""

    def make(self, out: Path, layout: Layout, workers: int, report: Progress) -> Contents:
        """Write the index files and, as `layout` asks, the images into `out`, or resume that."""


def import_images(
    importer: ImageImporter,
    out: Path,
    *,
    extract: bool,
    workers: int | None = None,
    overwrite: bool = False,
    checked: Collection[str] = (),
    report: Progress,
) -> ImageManifest:
    """Make `out` from the files of `importer`, or resume an earlier call with the same options.

    With `extract`, images become files in `train/<class id>` and `val/<class id>`, written by `workers` threads
    (without it, one for each processor); else they are packed, see `ImageManifest`. `checked` names the source files
    whose digest the caller has just seen to be right. `report` is called often with (phase, done, total), in a unit of
    each phase's own.

    Raises:
        UsageError: a source file is missing, or `out` holds something else or was made with other options.
        RunInterrupted: SIGTERM or SIGINT; the same call goes on.
        AsgoError: a source file is not what it must be, or the disk is full. The same call goes on.
    """
    if workers is not None and workers < 1:
        raise UsageError(f"--workers must be at least 1, not {workers}")
    layout: Layout = "extracted" if extract else "packed"
    recipe = {**importer.options, "layout": layout}
    new = Unfinished(dataset=importer.dataset, importer=importer.command, recipe=recipe)
    try:
        with stop_on_signals() as stop, held_folder(out):
            if not overwrite and (manifest := finished_manifest(out, new)) is not None:
                return manifest
            report = _stoppable(report, stop)
            paths = importer.find()
            state = begin_or_resume(out, new, overwrite)
            _require_same_files(out, state, paths)
            for path in paths:
                state = _check(out, state, importer, path, path.name in checked, report)
            contents = importer.make(out, layout, workers or os.cpu_count() or 1, report)
            if extract:
                report(WAITING, 0, 1)
                flush_to_disk(out)
            manifest = _manifest(out, layout, importer, state, contents)
            write_image_manifest(out, manifest)
            remove_notes(out)
            return manifest
    except OSError as error:
        raise AsgoError(f"{error.filename or out}: {error.strerror}; the same command goes on from here") from None


def on_disk(bytes: int, images: int) -> int:
    """How much so many images take as files, of which each ends with half a block in the mean."""
    return bytes + images * _DISK_BLOCK // 2


def require_room(out: Path, needed: int, otherwise: str) -> None:
    """Refuse at once what would fill the disk after hours. Raises `AsgoError` that tells what to do `otherwise`."""
    free = shutil.disk_usage(out).free
    if free < needed:
        raise AsgoError(
            f"{out}: the images take {needed / 1e9:,.1f} GB and {free / 1e9:,.1f} GB are free; "
            f"make room, or {otherwise}"
        )


def _manifest(
    out: Path, layout: Layout, importer: ImageImporter, state: Unfinished, contents: Contents
) -> ImageManifest:
    return ImageManifest(
        dataset=state.dataset,
        importer=state.importer,
        recipe=state.recipe,
        layout=layout,
        revision=importer.revision,
        source_folder=str(importer.folder),
        source_files=state.source_files,
        containers=contents.containers,
        pieces=contents.pieces,
        train_index=sha256_of(out / index_file("train")),
        validation_index=sha256_of(out / index_file("val")),
        fingerprint=fingerprint([each.id for each in contents.classes], contents.indices.values()),
        classes=_count(contents),
    )


def _stoppable(report: Progress, stop: StopRequest) -> Progress:
    """`report`, which then raises `RunInterrupted` after a signal."""

    def tell(phase: str, done: int, total: int) -> None:
        report(phase, done, total)
        if stop:
            raise RunInterrupted(f"{stop.signal_name} while {phase}; the same command goes on from here")

    return tell


def _require_same_files(out: Path, state: Unfinished, paths: Sequence[Path]) -> None:
    gone = {each.file for each in state.source_files} - {path.name for path in paths}
    if gone:
        raise UsageError(f"{min(gone)}: {out} was begun with it, and it is not there any more; pass --overwrite")


def _check(
    out: Path, state: Unfinished, importer: ImageImporter, path: Path, is_checked: bool, report: Progress
) -> Unfinished:
    """Check a file, unless an earlier call has: what is found is noted in the folder."""
    known = {each.file: each for each in state.source_files}
    before, expected, status = known.get(path.name), importer.expected(path), path.stat()
    if before is not None and (before.bytes, before.modified_ns) == (status.st_size, status.st_mtime_ns):
        digest = expected or before.digest
    elif is_checked and expected is not None:
        digest = expected
    else:
        digest = importer.check(path, report)
    if before is not None and before.digest != digest:
        raise UsageError(f"{path}: not the archive that {out} was begun with; pass --overwrite")
    now = SourceFile(file=path.name, bytes=status.st_size, digest=digest, modified_ns=status.st_mtime_ns)
    if now == before:
        return state
    state = state.model_copy(update={"source_files": tuple({**known, path.name: now}.values())})
    save_unfinished(out, state)
    return state


def _count(contents: Contents) -> tuple[ClassEntry, ...]:
    classes = contents.classes
    train, validation = (
        np.bincount(contents.indices[split].labels, minlength=len(classes)).tolist() for split in SPLITS
    )
    return tuple(
        ClassEntry(id=each.id, name=each.name, train=of_train, validation=of_validation)
        for each, of_train, of_validation in zip(classes, train, validation, strict=True)
    )
