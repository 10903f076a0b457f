"""Import an image data set from its source files into a folder to train from; verifies the source files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.data.holding import held_folder
from pipelines.data.images.extract import flush_to_disk
from pipelines.data.images.folder import begin_or_resume, earlier_state, finished_manifest, remove_notes
from pipelines.data.images.index import SPLITS, ImageClass, Index, fingerprint, index_file
from pipelines.data.images.manifest import (
    ClassEntry,
    ImageManifest,
    ImageShape,
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
"""The last reported phase, after all images are written."""

_DISK_BLOCK = 4096


@dataclass(frozen=True)
class Contents:
    """Result of an importer: the classes, sorted by id, and the index of each split.

    For packed images, either `pieces` lists the parts of the packed files, or `containers` gives the source file of
    each split. For decoded images, `image_shape` is (height, width, channels), and each split has one piece.
    """

    classes: tuple[ImageClass, ...]
    indices: Mapping[str, Index]
    pieces: tuple[Piece, ...] = ()
    containers: dict[str, str] = field(default_factory=dict)
    image_shape: ImageShape | None = None


class ImageImporter(Protocol):
    """A source of images for `import_images`."""

    dataset: str
    """The data set's name in messages."""
    command: str
    """The subcommand of `asgo data` that imports it."""
    options: dict[str, str]
    """The options of that command that determine the folder's content, without the layout."""
    folder: Path
    """Folder of the source files."""

    @property
    def revision(self) -> str | None:
        """The commit of the source, if known."""

    def find(self, report: Progress) -> Sequence[Path]:
        """Return all source files. Raises `UsageError` or `AsgoError` with what is missing and how to get it."""

    def expected(self, path: Path) -> str | None:
        """Return the digest, such as "md5:…", that a file must have; None if unknown."""

    def check(self, path: Path, report: Progress) -> str:
        """Read all of a file and return its digest. Raises `AsgoError` if it is not the expected one."""

    def make(self, out: Path, layout: Layout, workers: int, report: Progress) -> Contents:
        """Write the index files and, depending on `layout`, the images to `out`, or resume that."""


def import_images(
    importer: ImageImporter,
    out: Path,
    *,
    extract: bool | None,
    workers: int | None = None,
    overwrite: bool = False,
    checked: Collection[str] = (),
    report: Progress,
) -> ImageManifest:
    """Create `out` from the files of `importer`, or resume an earlier call with the same options.

    With `extract`, images become files in `train/<class id>` and `val/<class id>`, written by `workers` threads
    (default: one per CPU core); with False they are packed, with None the importer chooses; see `ImageManifest`.
    `checked` has the names of source files, relative to the importer's folder, whose digest the caller has just
    verified. Calls `report` often as (phase, done, total); the unit depends on the phase.

    Raises:
        UsageError: a source file is missing, or `out` holds other files or was made with other options.
        RunInterrupted: SIGTERM or SIGINT; the same call resumes.
        AsgoError: a source file has the wrong digest, or the disk is full. The same call resumes.
    """
    if workers is not None and workers < 1:
        raise UsageError(f"--workers must be at least 1, not {workers}")
    layout: Layout = "auto" if extract is None else "extracted" if extract else "packed"
    recipe = {**importer.options, "layout": layout}
    new = Unfinished(dataset=importer.dataset, importer=importer.command, recipe=recipe)
    try:
        with stop_on_signals() as stop, held_folder(out):
            if not overwrite and (manifest := finished_manifest(out, new)) is not None:
                return manifest
            before = earlier_state(out, new, overwrite)
            report = _stoppable(report, stop)
            paths = importer.find(report)
            state = begin_or_resume(out, new, before)
            _require_same_files(out, state, [_name(importer, path) for path in paths])
            for path in paths:
                state = _check(out, state, importer, path, _name(importer, path) in checked, report)
            contents = importer.make(out, layout, workers or os.cpu_count() or 1, report)
            if extract:
                report(WAITING, 0, 1)
                flush_to_disk(out)
            manifest = _manifest(out, importer, state, contents)
            write_image_manifest(out, manifest)
            remove_notes(out)
            return manifest
    except OSError as error:
        raise AsgoError(f"{error.filename or out}: {error.strerror}; run the same command again to resume") from None


def on_disk(bytes: int, images: int) -> int:
    """Return the disk space of images as files: each wastes half a block on average."""
    return bytes + images * _DISK_BLOCK // 2


def require_room(out: Path, needed: int, otherwise: str) -> None:
    """Raise `AsgoError` if the disk of `out` has fewer than `needed` bytes free; `otherwise` is the advice."""
    free = shutil.disk_usage(out).free
    if free < needed:
        raise AsgoError(
            f"{out}: the images take {needed / 1e9:,.1f} GB and {free / 1e9:,.1f} GB are free; "
            f"free some space, or {otherwise}"
        )


def require_every_class(classes: Sequence[ImageClass], labels: Mapping[str, NDArray[np.int64]]) -> None:
    """Raise `AsgoError` with a class that has no image in a split, given the labels of each split."""
    for split, numbers in labels.items():
        counts = np.bincount(numbers, minlength=len(classes))
        if not counts.all():
            empty = classes[int(counts.argmin())]
            raise AsgoError(f"class {empty.id}, {empty.name}: no images in {split}")


def _manifest(out: Path, importer: ImageImporter, state: Unfinished, contents: Contents) -> ImageManifest:
    is_packed = contents.pieces or contents.containers
    pixels = [piece.sha256 for piece in contents.pieces] if contents.image_shape else ()
    return ImageManifest(
        dataset=state.dataset,
        importer=state.importer,
        recipe=state.recipe,
        layout="decoded" if contents.image_shape else "packed" if is_packed else "extracted",
        image_shape=contents.image_shape,
        revision=importer.revision,
        source_folder=str(importer.folder),
        source_files=state.source_files,
        containers=contents.containers,
        pieces=contents.pieces,
        train_index=sha256_of(out / index_file("train")),
        validation_index=sha256_of(out / index_file("val")),
        fingerprint=fingerprint([each.id for each in contents.classes], contents.indices.values(), pixels),
        classes=_count(contents),
    )


def _stoppable(report: Progress, stop: StopRequest) -> Progress:
    """Return `report`, extended to raise `RunInterrupted` after a signal."""

    def stoppable(phase: str, done: int, total: int) -> None:
        report(phase, done, total)
        if stop:
            raise RunInterrupted(f"{stop.signal_name} while {phase}; run the same command again to resume")

    return stoppable


def _name(importer: ImageImporter, path: Path) -> str:
    """Return the path of a source file relative to the importer's folder, or its name if it is not in there."""
    is_inside = importer.folder in path.parents
    return str(path.relative_to(importer.folder)) if is_inside else path.name


def _require_same_files(out: Path, state: Unfinished, names: Sequence[str]) -> None:
    gone = {each.file for each in state.source_files} - {*names}
    if gone:
        raise UsageError(f"{min(gone)}: missing, but {out} was started with it; pass --overwrite to start again")


def _check(
    out: Path, state: Unfinished, importer: ImageImporter, path: Path, is_checked: bool, report: Progress
) -> Unfinished:
    """Check a file, unless an earlier call did, and record the result in the folder."""
    known = {each.file: each for each in state.source_files}
    name = _name(importer, path)
    before, expected, status = known.get(name), importer.expected(path), path.stat()
    if before is not None and (before.bytes, before.modified_ns) == (status.st_size, status.st_mtime_ns):
        digest = expected or before.digest
    elif is_checked and expected is not None:
        digest = expected
    else:
        digest = importer.check(path, report)
    if before is not None and before.digest != digest:
        raise UsageError(f"{path}: has changed since {out} was started; pass --overwrite to start again")
    now = SourceFile(file=name, bytes=status.st_size, digest=digest, modified_ns=status.st_mtime_ns)
    if now == before:
        return state
    state = state.model_copy(update={"source_files": tuple({**known, name: now}.values())})
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
