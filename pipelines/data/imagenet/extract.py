"""Images from the archives into a folder a class, by several threads, so that a kill at any moment does no harm."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipelines.data.imagenet.archives import Progress
from pipelines.data.imagenet.image_files import (
    expected_sizes,
    make_partial_folder,
    partial_folder,
    publish,
    reopen,
    require_only,
    sizes_in,
    write_image,
)
from pipelines.data.imagenet.index import Index
from pipelines.data.imagenet.members import open_tar
from pipelines.data.imagenet.threads import Tally, in_threads
from pipelines.errors import AsgoError


def extract_images(
    archive: Path, index: Index, target: Path, wnids: Sequence[str], workers: int, progress: Progress
) -> None:
    """Write the images of `index` to `target/<wnid>/<name>`; what is there already is kept.

    A class is written to the hidden folder `.<wnid>.partial`, which is renamed when it is whole: a class folder that
    exists is complete. `progress` is called in this thread, many times a second, and ends the work by raising.

    Raises `AsgoError` when the archive is shorter than its index says or a file is in the way, and `OSError` when the
    disk refuses.
    """
    target.mkdir(exist_ok=True)
    phase, total = f"extracting {archive.name}", int(index.sizes.sum())
    with open_tar(archive) as tar:
        work = _Work(tar.descriptor, archive, Tally())
        jobs = [partial(_extract_class, work, target / wnids[label], images) for label, images in index.by_class()]
        in_threads(jobs, workers, work.tally, lambda done: progress(phase, done, total))


def flush_to_disk(folder: Path) -> None:
    """Wait until everything in the file system of `folder` is on the disk. Raises `AsgoError` if some of it was lost.

    One call for all files: an fsync for each of 1.3 million would take longer than writing them.
    """
    try:
        syncfs = ctypes.CDLL(None, use_errno=True).syncfs
    except (AttributeError, OSError):  # not Linux
        os.sync()
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if syncfs(descriptor):
            problem = os.strerror(ctypes.get_errno())
            raise AsgoError(f"{folder}: the disk lost what was written ({problem}); mend it, and pass --overwrite")
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class _Work:
    """What the threads share."""

    descriptor: int
    archive: Path
    tally: Tally


def _extract_class(work: _Work, folder: Path, images: Index) -> None:
    expected = expected_sizes(images)
    there = sizes_in(folder)
    if there == expected:
        work.tally.advance(sum(expected.values()))
        return
    require_only(expected, folder, there)
    if there:  # a power cut or a hand took from it
        reopen(folder)
    make_partial_folder(folder)
    _write_missing(work, partial_folder(folder), expected, images.offsets.tolist())
    if not work.tally.stop.is_set():
        publish(folder, expected)


def _write_missing(work: _Work, folder: Path, expected: dict[str, int], offsets: Sequence[int]) -> None:
    there = sizes_in(folder)
    require_only(expected, folder, there)
    # One buffer for all: to allocate one an image, and give it back to the system, would cost as much as the writing.
    buffer = memoryview(bytearray(max(expected.values())))
    parent = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for (name, size), offset in zip(expected.items(), offsets, strict=True):
            if work.tally.stop.is_set():
                return
            if there.get(name) != size:
                _copy(work, buffer[:size], offset, folder / name, parent)
            work.tally.advance(size)
    finally:
        os.close(parent)


def _copy(work: _Work, content: memoryview, offset: int, path: Path, parent: int) -> None:
    if os.preadv(work.descriptor, [content], offset) < len(content):
        raise AsgoError(f"{work.archive}: ends in {path.name}, so it was cut after it was checked")
    write_image(path, content, parent)
