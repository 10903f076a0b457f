"""The archives of ImageNet into a folder to train from: checked, labelled, and extracted or indexed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.data.corpus.folder import held_folder
from pipelines.data.imagenet.archives import ARCHIVES, Archive, Progress, check_archive, expected_archives
from pipelines.data.imagenet.extract import extract_images, flush_to_disk
from pipelines.data.imagenet.folder import begin_or_go_on, finished_manifest
from pipelines.data.imagenet.index import (
    SPLITS,
    Index,
    build_train_index,
    build_validation_index,
    fingerprint,
    index_file,
    read_index,
    write_index,
)
from pipelines.data.imagenet.labels import Labels, read_devkit
from pipelines.data.imagenet.manifest import (
    CheckedArchive,
    ClassEntry,
    ImagenetManifest,
    Layout,
    Unfinished,
    save_unfinished,
    write_imagenet_manifest,
)
from pipelines.data.imagenet.members import open_tar
from pipelines.data.manifest import UNFINISHED
from pipelines.errors import AsgoError, RunInterrupted, UsageError
from pipelines.stopping import StopRequest, stop_on_signals
from pipelines.storage import sha256_of

WAITING = "waiting for the disk"
"""The last phase that is reported, when all images are written."""

_DISK_BLOCK = 4096


def prepare_imagenet(
    archives_folder: Path,
    out: Path,
    *,
    extract: bool,
    workers: int | None = None,
    overwrite: bool = False,
    checked: Collection[str] = (),
    report: Progress,
) -> ImagenetManifest:
    """Make `out` from the three archives, or go on where an earlier call with the same options was ended.

    With `extract`, images become files in `train/<wnid>` and `val/<wnid>`, written by `workers` threads (without it,
    one for each processor); else they stay in the archives, and the index says where. `checked` names the archives
    (keys of `ARCHIVES`) whose MD5 the caller has just seen to be right. `report` is called often with (phase, done,
    total), in bytes, or in classes while indexing.

    Raises:
        UsageError: an archive is missing, or `out` holds something else or was made with other options.
        RunInterrupted: SIGTERM or SIGINT; the same call goes on.
        AsgoError: an archive is not what it must be, or the disk is full. The same call goes on.
    """
    if workers is not None and workers < 1:
        raise UsageError(f"--workers must be at least 1, not {workers}")
    layout: Layout = "extracted" if extract else "archives"
    recipe = {"archives": str(archives_folder.resolve()), "layout": layout}
    try:
        with stop_on_signals() as stop, held_folder(out):
            if not overwrite and (manifest := finished_manifest(out, recipe)) is not None:
                return manifest
            work = _Work(out, archives_folder.resolve(), layout, workers or os.cpu_count() or 1, _heed(report, stop))
            work.require_archives()
            state = begin_or_go_on(out, recipe, overwrite)
            return work.complete(work.check_archives(state, checked))
    except OSError as error:
        raise AsgoError(f"{error.filename or out}: {error.strerror}; the same command goes on from here") from None


def _heed(report: Progress, stop: StopRequest) -> Progress:
    """`report`, and the place where a signal is heard."""

    def tell(phase: str, done: int, total: int) -> None:
        report(phase, done, total)
        if stop:
            raise RunInterrupted(f"{stop.signal_name} while {phase}; the same command goes on from here")

    return tell


@dataclass(frozen=True)
class _Work:
    """What one call is about."""

    out: Path
    archives_folder: Path
    layout: Layout
    workers: int
    report: Progress

    def path(self, key: str) -> Path:
        return self.archives_folder / ARCHIVES[key].file

    def require_archives(self) -> None:
        """Raise `UsageError` that names every archive that is not there."""
        missing = [self.path(key).name for key in ARCHIVES if not self.path(key).is_file()]
        if missing:
            raise UsageError(
                f"{self.archives_folder}: no {', no '.join(missing)}; name the folder of the archives "
                "with --archives, or get them with --download"
            )

    def check_archives(self, state: Unfinished, checked: Collection[str]) -> tuple[CheckedArchive, ...]:
        """Check the archives, each but once: what is found is noted in the folder."""
        expected = expected_archives(self.archives_folder)
        known = {archive.file: archive for archive in state.archives}
        for key, archive in expected.items():
            if archive.file in known and known[archive.file].md5 != archive.md5:
                raise UsageError(f"{self.path(key)}: not the archive that {self.out} was begun with; pass --overwrite")
            known[archive.file] = self._checked(key, archive, known.get(archive.file), key in checked)
            state = state.model_copy(update={"archives": tuple(known.values())})
            save_unfinished(self.out, state)
        return state.archives

    def _checked(self, key: str, archive: Archive, before: CheckedArchive | None, is_checked: bool) -> CheckedArchive:
        status = self.path(key).stat()
        now = CheckedArchive(file=archive.file, bytes=status.st_size, md5=archive.md5, modified_ns=status.st_mtime_ns)
        if now != before and not is_checked:
            check_archive(self.path(key), archive, self.report)
        return now

    def complete(self, archives: tuple[CheckedArchive, ...]) -> ImagenetManifest:
        """Index, extract where that is asked for, and write the manifest last."""
        labels = read_devkit(self.path("devkit"))
        wnids = [each.wnid for each in labels.classes]
        indices = {split: self._index(split, labels, wnids) for split in SPLITS}
        if self.layout == "extracted":
            self._require_space(indices)
            for split, index in indices.items():
                extract_images(self.path(split), index, self.out / split, wnids, self.workers, self.report)
            self.report(WAITING, 0, 1)
            flush_to_disk(self.out)
        manifest = self._manifest(archives, labels, wnids, indices)
        write_imagenet_manifest(self.out, manifest)
        with contextlib.suppress(OSError):
            (self.out / UNFINISHED).unlink()
        return manifest

    def _index(self, split: str, labels: Labels, wnids: list[str]) -> Index:
        path = self.out / index_file(split)
        if not path.exists():
            with open_tar(self.path(split)) as tar:
                if split == "train":
                    index = build_train_index(tar, labels, self.report)
                else:
                    index = build_validation_index(tar, labels, self.report)
            write_index(path, index, wnids)
        return read_index(path, wnids)

    def _require_space(self, indices: Mapping[str, Index]) -> None:
        """Refuse at once what would fill the disk after hours; what is there of an earlier call is not counted."""
        if any((self.out / split).exists() for split in indices):
            return
        needed = sum(int((-(-index.sizes // _DISK_BLOCK) * _DISK_BLOCK).sum()) for index in indices.values())
        free = shutil.disk_usage(self.out).free
        if free < needed:
            raise AsgoError(
                f"{self.out}: the images take {needed / 1e9:,.1f} GB and {free / 1e9:,.1f} GB are free; make room, "
                "or leave them in the archives with --no-extract"
            )

    def _manifest(
        self, archives: tuple[CheckedArchive, ...], labels: Labels, wnids: list[str], indices: Mapping[str, Index]
    ) -> ImagenetManifest:
        counts = {split: np.bincount(index.labels, minlength=len(wnids)) for split, index in indices.items()}
        return ImagenetManifest(
            layout=self.layout,
            archives_folder=str(self.archives_folder),
            archives=archives,
            train_index=sha256_of(self.out / index_file("train")),
            validation_index=sha256_of(self.out / index_file("val")),
            fingerprint=fingerprint(wnids, indices.values()),
            classes=tuple(
                ClassEntry(wnid=each.wnid, name=each.name, train=int(train), validation=int(validation))
                for each, train, validation in zip(labels.classes, counts["train"], counts["val"], strict=True)
            ),
        )
