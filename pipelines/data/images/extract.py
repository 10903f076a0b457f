"""Write images as files, one folder per class. A folder appears only when it is complete, also after a kill."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipelines.data.images.index import Index
from pipelines.data.progress import Progress, Tally, in_threads
from pipelines.errors import AsgoError


def extract_images(
    archive: Path, index: Index, target: Path, class_ids: Sequence[str], workers: int, progress: Progress
) -> None:
    """Write the images of `index` to `target/<class id>/<name>`; keep existing ones.

    A class is written to the hidden folder `.<class id>.partial`, which is renamed when it is complete: a class folder
    that exists is complete. Calls `progress` several times a second in this thread; if it raises, the work ends.

    Raises `AsgoError` if the archive is shorter than its index says or another file is in the folder, and `OSError` for
    disk errors.
    """
    target.mkdir(exist_ok=True)
    phase, total = f"extracting {archive.name}", int(index.sizes.sum())
    descriptor = os.open(archive, os.O_RDONLY)
    try:
        work = _Work(descriptor, archive, Tally())
        jobs = [partial(_extract_class, work, target / class_ids[label], images) for label, images in index.by_class()]
        in_threads(jobs, workers, work.tally, lambda done: progress(phase, done, total))
    finally:
        os.close(descriptor)


def flush_to_disk(folder: Path) -> None:
    """Flush the file system of `folder` to the disk. Raises `AsgoError` if data was lost.

    One call for all files: an fsync for each of 1.3 million files would take longer than writing them.
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
            raise AsgoError(f"{folder}: the disk lost written data ({problem}); repair it and pass --overwrite")
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class _Work:
    """State that the threads share."""

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
    if there:  # a power failure or a user removed files from the folder
        reopen(folder)
    make_partial_folder(folder)
    _write_missing(work, partial_folder(folder), expected, images.offsets.tolist())
    publish(folder, expected)


def _write_missing(work: _Work, folder: Path, expected: dict[str, int], offsets: Sequence[int]) -> None:
    there = sizes_in(folder)
    require_only(expected, folder, there)
    # One buffer for all images: allocating one per image takes as long as the writing.
    buffer = memoryview(bytearray(max(expected.values())))
    parent = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for (name, size), offset in zip(expected.items(), offsets, strict=True):
            if there.get(name) != size:
                _copy(work, buffer[:size], offset, folder / name, parent)
            work.tally.advance(size)
    finally:
        os.close(parent)


def _copy(work: _Work, content: memoryview, offset: int, path: Path, parent: int) -> None:
    if os.preadv(work.descriptor, [content], offset) < len(content):
        raise AsgoError(f"{work.archive}: ends in {path.name}, so it was truncated after it was checked")
    write_image(path, content, parent)


def partial_folder(folder: Path) -> Path:
    """Return the hidden folder where `folder` is built: `.<name>.partial` beside it."""
    return folder.with_name(f".{folder.name}.partial")


def make_partial_folder(folder: Path) -> None:
    """Create the hidden folder, or keep an existing one. Removes a symbolic link, which must not be followed."""
    partial = partial_folder(folder)
    if partial.is_symlink():
        partial.unlink()
    partial.mkdir(exist_ok=True)


def reopen(folder: Path) -> None:
    """Rename `folder` to its hidden name, to complete it."""
    shutil.rmtree(partial_folder(folder), ignore_errors=True)
    folder.rename(partial_folder(folder))


def publish(folder: Path, expected: dict[str, int]) -> None:
    """Rename the hidden folder to `folder`. Raises `AsgoError` unless its files have the `expected` names and sizes."""
    partial = partial_folder(folder)
    there = sizes_in(partial)
    require_only(expected, partial, there)
    if there != expected:
        raise AsgoError(f"{partial}: another program changes this folder; run again when that program has ended")
    partial.rename(folder)


def sizes_in(folder: Path) -> dict[str, int]:
    """Return the sizes of the files of `folder` by name; -1 for what is not a plain file."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        return {
            entry.name: entry.stat(follow_symlinks=False).st_size if entry.is_file(follow_symlinks=False) else -1
            for entry in entries
        }
    return {}


def expected_sizes(images: Index) -> dict[str, int]:
    """Return the sizes of the files of one class's images by name."""
    return dict(zip((name.decode() for name in images.names.tolist()), images.sizes.tolist(), strict=True))


def require_only(expected: Iterable[str], folder: Path, there: dict[str, int]) -> None:
    """Raise `AsgoError` with a file in `folder` that is not expected."""
    for name in there.keys() - set(expected):
        raise AsgoError(f"{folder / name}: not part of the archive; remove it")


def write_image(path: Path, content: memoryview | bytes, parent: int | None = None) -> None:
    """Write a file; `parent` is a descriptor of its folder. Writes in order: a file of the full size is complete."""
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        descriptor = os.open(path if parent is None else path.name, flags, 0o666, dir_fd=parent)
        try:
            while content:
                content = content[os.write(descriptor, content) :]
        finally:
            os.close(descriptor)
    except OSError as error:
        error.filename = str(path)
        raise
