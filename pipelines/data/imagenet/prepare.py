"""ImageNet from its archives or from the hub's copy, checked, into a folder to train from."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np

from pipelines.data.holding import held_folder
from pipelines.data.imagenet.archives import Progress
from pipelines.data.imagenet.extract import flush_to_disk
from pipelines.data.imagenet.folder import begin_or_go_on, finished_manifest, remove_notes
from pipelines.data.imagenet.from_archives import ArchiveFiles
from pipelines.data.imagenet.from_hub import HubFiles
from pipelines.data.imagenet.index import SPLITS, fingerprint, index_file
from pipelines.data.imagenet.manifest import (
    CheckedArchive,
    ClassEntry,
    ImagenetManifest,
    Layout,
    Origin,
    Unfinished,
    make_recipe,
    save_unfinished,
    write_imagenet_manifest,
)
from pipelines.data.imagenet.origin import Contents, OriginFiles
from pipelines.errors import AsgoError, RunInterrupted, UsageError
from pipelines.stopping import StopRequest, stop_on_signals
from pipelines.storage import sha256_of

WAITING = "waiting for the disk"
"""The last phase that is reported, when all images are written."""

_ORIGINS: dict[Origin, Callable[[Path], OriginFiles]] = {"archives": ArchiveFiles, "hub": HubFiles}


def prepare_imagenet(
    archives_folder: Path,
    out: Path,
    *,
    origin: Origin = "archives",
    extract: bool,
    workers: int | None = None,
    overwrite: bool = False,
    checked: Collection[str] = (),
    report: Progress,
) -> ImagenetManifest:
    """Make `out` from the files in `archives_folder`, or go on where an earlier call with the same options was ended.

    They are the three archives, or what `download_hub_copy` brought. With `extract`, images become files in
    `train/<wnid>` and `val/<wnid>`, written by `workers` threads (without it, one for each processor); else they stay
    in the archives, or are copied from the hub's files into one file a split, and the index says where. `checked` names
    the files whose digest the caller has just seen to be right. `report` is called often with (phase, done, total), in
    a unit of each phase's own.

    Raises:
        UsageError: an archive is missing, or `out` holds something else or was made with other options.
        RunInterrupted: SIGTERM or SIGINT; the same call goes on.
        AsgoError: an archive is not what it must be, or the disk is full. The same call goes on.
    """
    if workers is not None and workers < 1:
        raise UsageError(f"--workers must be at least 1, not {workers}")
    layout: Layout = "extracted" if extract else "packed"
    files = _ORIGINS[origin](archives_folder.resolve())
    recipe = make_recipe(origin, str(files.folder), layout)
    try:
        with stop_on_signals() as stop, held_folder(out):
            if not overwrite and (manifest := finished_manifest(out, recipe)) is not None:
                return manifest
            report = _heed(report, stop)
            paths = files.find()
            state = begin_or_go_on(out, recipe, overwrite)
            _require_same_files(out, state, paths)
            for path in paths:
                state = _check(out, state, files, path, path.name in checked, report)
            contents = files.make(out, layout, workers or os.cpu_count() or 1, report)
            if extract:
                report(WAITING, 0, 1)
                flush_to_disk(out)
            manifest = _manifest(out, layout, files, state.archives, contents)
            write_imagenet_manifest(out, manifest)
            remove_notes(out)
            return manifest
    except OSError as error:
        raise AsgoError(f"{error.filename or out}: {error.strerror}; the same command goes on from here") from None


def _manifest(
    out: Path, layout: Layout, files: OriginFiles, archives: tuple[CheckedArchive, ...], contents: Contents
) -> ImagenetManifest:
    return ImagenetManifest(
        origin=files.origin,
        layout=layout,
        archives_folder=str(files.folder),
        revision=files.revision,
        archives=archives,
        pieces=contents.pieces,
        train_index=sha256_of(out / index_file("train")),
        validation_index=sha256_of(out / index_file("val")),
        fingerprint=fingerprint([each.wnid for each in contents.classes], contents.indices.values()),
        classes=_count(contents),
    )


def _heed(report: Progress, stop: StopRequest) -> Progress:
    """`report`, and the place where a signal is heard."""

    def tell(phase: str, done: int, total: int) -> None:
        report(phase, done, total)
        if stop:
            raise RunInterrupted(f"{stop.signal_name} while {phase}; the same command goes on from here")

    return tell


def _require_same_files(out: Path, state: Unfinished, paths: Sequence[Path]) -> None:
    gone = {archive.file for archive in state.archives} - {path.name for path in paths}
    if gone:
        raise UsageError(f"{min(gone)}: {out} was begun with it, and it is not there any more; pass --overwrite")


def _check(
    out: Path, state: Unfinished, files: OriginFiles, path: Path, is_checked: bool, report: Progress
) -> Unfinished:
    """Check a file, unless an earlier call has: what is found is noted in the folder."""
    known = {archive.file: archive for archive in state.archives}
    before, expected, status = known.get(path.name), files.expected(path), path.stat()
    if before is not None and (before.bytes, before.modified_ns) == (status.st_size, status.st_mtime_ns):
        digest = expected or before.digest
    elif is_checked and expected is not None:
        digest = expected
    else:
        digest = files.check(path, report)
    if before is not None and before.digest != digest:
        raise UsageError(f"{path}: not the archive that {out} was begun with; pass --overwrite")
    now = CheckedArchive(file=path.name, bytes=status.st_size, digest=digest, modified_ns=status.st_mtime_ns)
    if now == before:
        return state
    state = state.model_copy(update={"archives": tuple({**known, path.name: now}.values())})
    save_unfinished(out, state)
    return state


def _count(contents: Contents) -> tuple[ClassEntry, ...]:
    classes = contents.classes
    train, validation = (
        np.bincount(contents.indices[split].labels, minlength=len(classes)).tolist() for split in SPLITS
    )
    return tuple(
        ClassEntry(wnid=each.wnid, name=each.name, train=of_train, validation=of_validation)
        for each, of_train, of_validation in zip(classes, train, validation, strict=True)
    )
