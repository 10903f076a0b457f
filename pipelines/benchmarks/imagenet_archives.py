"""Speed of extracting ImageNet's archives, compared with torchvision, and of indexing, compared with tarfile."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any
from unittest import mock

import numpy as np

from pipelines.benchmarks.turns import Progress, in_turns, median_ratio
from pipelines.data.imagenet.archive_index import build_train_index, build_validation_index
from pipelines.data.imagenet.archives import ARCHIVES, MD5SUMS, expected_archives
from pipelines.data.imagenet.devkit import Labels
from pipelines.data.imagenet.importer import prepare_imagenet
from pipelines.data.images.extract import flush_to_disk
from pipelines.data.images.importing import WAITING
from pipelines.data.images.index import ImageClass
from pipelines.data.images.tar import open_tar
from pipelines.errors import UsageError

_MEAN_BYTES = 110_000  # of ImageNet's training images
_INDEX_CLASSES, _INDEX_IMAGES = 100, 1000


@dataclass(frozen=True)
class ArchivesReport:
    """Seconds of each round; `index_members` is the number of headers that indexing and tarfile read.

    Extraction is timed from the archives to the last image, with the check of the digests, but without the flush to
    disk: asgo waits for it, torchvision does not.
    """

    workers: int
    images: int
    bytes: int
    asgo_s: tuple[float, ...]
    torchvision_s: tuple[float, ...]
    index_members: int
    index_s: tuple[float, ...]
    tarfile_s: tuple[float, ...]

    @property
    def speedup(self) -> float:
        """Speed relative to torchvision, median over the rounds."""
        return median_ratio(self.torchvision_s, self.asgo_s)

    def as_json(self) -> dict[str, Any]:
        """Return the report as plain values for JSON."""
        return {
            "workers": self.workers,
            "images": self.images,
            "bytes": self.bytes,
            "extraction_s": {"asgo": self.asgo_s, "torchvision": self.torchvision_s},
            "extraction_speedup": self.speedup,
            "index_members": self.index_members,
            "index_s": {"asgo": self.index_s, "tarfile": self.tarfile_s},
        }


def bench_archives(classes: int, images: int, workers: int | None, repeats: int, progress: Progress) -> ArchivesReport:
    """Measure both on synthetic archives of `classes` classes with `images` training images, in `repeats` rounds.

    The images are random bytes of typical lengths, which compress as little as photographs. Calls
    `progress(what, turns done, turns)`. Raises `UsageError` if torchvision is missing.
    """
    workers = workers or os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="asgo-bench-") as name:
        folder = Path(name)
        progress("making archives", 0, 4 * repeats)
        labels = _write_archives(folder / "archives", classes, images, _MEAN_BYTES)
        tiny = _write_archives(folder / "tiny", _INDEX_CLASSES, _INDEX_IMAGES, 200)

        def cleaned(run: Callable[[], float]) -> float:
            seconds = run()
            shutil.rmtree(folder / "out", ignore_errors=True)
            flush_to_disk(folder)
            return seconds

        ways = {
            "asgo": partial(_run_asgo, folder / "archives", folder / "out", workers),
            "torchvision": partial(_run_torchvision, folder / "archives", labels, folder / "out"),
            "index": partial(_index, folder / "tiny", tiny),
            "tarfile": partial(_list_with_tarfile, folder / "tiny"),
        }
        seconds = in_turns({name: partial(cleaned, run) for name, run in ways.items()}, repeats, progress)
        size = sum((folder / "archives" / ARCHIVES[key].file).stat().st_size for key in ("train", "val"))
    return ArchivesReport(
        workers,
        classes * images + len(labels.validation),
        size,
        tuple(seconds["asgo"]),
        tuple(seconds["torchvision"]),
        _INDEX_CLASSES * (_INDEX_IMAGES + 1) + len(tiny.validation),
        tuple(seconds["index"]),
        tuple(seconds["tarfile"]),
    )


def _ignore_progress(phase: str, done: int, total: int) -> None:
    """Do nothing: timed work shows no progress."""


def _run_asgo(archives: Path, out: Path, workers: int) -> float:
    moments = [time.perf_counter()]

    def note(phase: str, done: int, total: int) -> None:
        if phase == WAITING:
            moments.append(time.perf_counter())

    prepare_imagenet(archives, out, extract=True, workers=workers, report=note)
    return moments[-1] - moments[0]


def _run_torchvision(archives: Path, labels: Labels, out: Path) -> float:
    try:
        from torchvision.datasets import imagenet
    except ImportError:
        raise UsageError("torchvision, the baseline here, is missing: pip install torchvision") from None
    expected = {key: (each.file, each.md5) for key, each in expected_archives(archives).items()}
    out.mkdir()
    began = time.perf_counter()
    with mock.patch.dict(imagenet.ARCHIVE_META, expected):
        # Absolute paths replace the root in torchvision's join: nothing is written beside the archives.
        imagenet.parse_train_archive(archives, folder=str(out / "train"))
        imagenet.parse_val_archive(archives, wnids=list(labels.validation), folder=str(out / "val"))
    return time.perf_counter() - began


def _index(archives: Path, labels: Labels) -> float:
    began = time.perf_counter()
    with open_tar(archives / ARCHIVES["train"].file) as train, open_tar(archives / ARCHIVES["val"].file) as validation:
        build_train_index(train, labels, _ignore_progress)
        build_validation_index(validation, labels, _ignore_progress)
    return time.perf_counter() - began


def _list_with_tarfile(archives: Path) -> float:
    began = time.perf_counter()
    with tarfile.open(archives / ARCHIVES["train"].file) as outer, tarfile.open(archives / ARCHIVES["val"].file) as val:
        val.getmembers()
        for member in outer.getmembers():
            with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                inner.getmembers()
    return time.perf_counter() - began


def _write_archives(folder: Path, classes: int, images: int, mean_bytes: int) -> Labels:
    """Write archives structured like ImageNet's, with 1/20 as many validation as training images; return the labels."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    pool = rng.bytes(4 * mean_bytes)

    def image() -> bytes:
        start, size = rng.integers(2 * mean_bytes), rng.integers(mean_bytes // 2, 3 * mean_bytes // 2)
        return pool[start : start + size]

    wnids = [f"n{10_000_000 + label:08d}" for label in range(classes)]
    labels = Labels(tuple(ImageClass(wnid, wnid) for wnid in wnids), tuple(wnids) * max(1, images // 20))
    classes_of_images = (
        (f"{wnid}.tar", tar_of((f"{wnid}_{each}.JPEG", image()) for each in range(images))) for wnid in wnids
    )
    with (folder / ARCHIVES["train"].file).open("wb") as file:
        write_tar(file, classes_of_images)
    validation = range(1, len(labels.validation) + 1)
    with (folder / ARCHIVES["val"].file).open("wb") as file:
        write_tar(file, ((f"ILSVRC2012_val_{each:08d}.JPEG", image()) for each in validation))
    numbers = [f"{label % classes + 1}\n" for label in range(len(labels.validation))]
    table = [f"{wnid} {number} {wnid}\n" for number, wnid in enumerate(wnids, start=1)]
    kit = {"ILSVRC2012_validation_ground_truth.txt": numbers, "map_clsloc.txt": table}
    kit_tar = tar_of((name, "".join(lines).encode()) for name, lines in kit.items())
    (folder / ARCHIVES["devkit"].file).write_bytes(gzip.compress(kit_tar))
    sums = (f"{_md5(folder / archive.file)}  {archive.file}\n" for archive in ARCHIVES.values())
    (folder / MD5SUMS).write_text("".join(sums))
    return labels


def tar_of(files: Iterable[tuple[str, bytes]]) -> bytes:
    """Return a tar archive of (name, content) pairs, made in memory."""
    buffer = io.BytesIO()
    write_tar(buffer, files)
    return buffer.getvalue()


def write_tar(file: IO[bytes], files: Iterable[tuple[str, bytes]]) -> None:
    """Write a tar archive of (name, content) pairs."""
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
