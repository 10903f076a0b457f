"""Images from the archives into a folder a class, by several threads, so that a kill at any moment does no harm."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipelines.data.imagenet.archives import Progress
from pipelines.data.imagenet.index import Index
from pipelines.data.imagenet.members import open_tar
from pipelines.errors import AsgoError

_POLL_S = 0.1


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
    by_class = np.split(np.argsort(index.labels, kind="stable"), np.cumsum(np.bincount(index.labels))[:-1])
    with open_tar(archive) as tar, ThreadPoolExecutor(workers) as pool:
        work = _Work(tar.descriptor, archive)
        progress(phase, 0, total)
        try:
            pending = {
                pool.submit(_extract_class, work, target / wnids[index.labels[chosen[0]]], index.take(chosen))
                for chosen in by_class
                if len(chosen)
            }
            while pending:
                done, pending = wait(pending, _POLL_S, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                progress(phase, work.done, total)
        finally:
            work.stop.set()
            pool.shutdown(cancel_futures=True)


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


@dataclass
class _Work:
    """What the threads share."""

    descriptor: int
    archive: Path
    stop: threading.Event = field(default_factory=threading.Event)
    done: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def advance(self, size: int) -> None:
        with self.lock:
            self.done += size


def _extract_class(work: _Work, folder: Path, images: Index) -> None:
    expected = dict(zip((name.decode() for name in images.names.tolist()), images.sizes.tolist(), strict=True))
    there = _sizes(folder)
    if there == expected:
        work.advance(sum(expected.values()))
        return
    _require_only(expected, folder, there)
    partial = folder.with_name(f".{folder.name}.partial")
    if there:  # a power cut or a hand took from it
        shutil.rmtree(partial, ignore_errors=True)
        folder.rename(partial)
    partial.mkdir(exist_ok=True)
    _write_missing(work, partial, expected, images.offsets.tolist())
    if work.stop.is_set():
        return
    if _sizes(partial) != expected:
        raise AsgoError(f"{partial}: another program changes it; start again when that has ended")
    partial.rename(folder)


def _write_missing(work: _Work, folder: Path, expected: dict[str, int], offsets: Sequence[int]) -> None:
    # A file is written from its beginning on, so one that has its full size is whole.
    there = _sizes(folder)
    _require_only(expected, folder, there)
    # One buffer for all: to allocate one an image, and give it back to the system, would cost as much as the writing.
    buffer = memoryview(bytearray(max(expected.values())))
    parent = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for (name, size), offset in zip(expected.items(), offsets, strict=True):
            if work.stop.is_set():
                return
            if there.get(name) != size:
                _copy(work, buffer[:size], offset, parent, folder / name)
            work.advance(size)
    finally:
        os.close(parent)


def _copy(work: _Work, content: memoryview, offset: int, parent: int, path: Path) -> None:
    if os.preadv(work.descriptor, [content], offset) < len(content):
        raise AsgoError(f"{work.archive}: ends in {path.name}, so it was cut after it was checked")
    try:
        descriptor = os.open(path.name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666, dir_fd=parent)
        try:
            while content:
                content = content[os.write(descriptor, content) :]
        finally:
            os.close(descriptor)
    except OSError as error:
        error.filename = str(path)
        raise


def _sizes(folder: Path) -> dict[str, int]:
    """The plain files of `folder`, and their sizes; others count as -1."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        return {
            entry.name: entry.stat(follow_symlinks=False).st_size if entry.is_file(follow_symlinks=False) else -1
            for entry in entries
        }
    return {}


def _require_only(expected: dict[str, int], folder: Path, there: dict[str, int]) -> None:
    for name in there.keys() - expected.keys():
        raise AsgoError(f"{folder / name}: no part of the archive; remove it")
