"""Import images that are read as streams from source files, to one folder per class or one file per split."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipelines.data.images.extract import (
    expected_sizes,
    make_partial_folder,
    partial_folder,
    publish,
    reopen,
    require_only,
    sizes_in,
    write_image,
)
from pipelines.data.images.folder import PARTS
from pipelines.data.images.importing import Contents, on_disk, require_room
from pipelines.data.images.index import (
    ImageClass,
    Index,
    build_index,
    index_file,
    joined,
    packed_file,
    read_index,
    write_index,
)
from pipelines.data.images.manifest import Layout, Piece
from pipelines.data.progress import Progress, Tally, in_threads
from pipelines.errors import AsgoError
from pipelines.storage import refusing_links, sync, write_atomically


class StreamedImage(NamedTuple):
    """An image: its class, its file name (`n01440764_10026.JPEG`) and the bytes of the file."""

    class_id: str
    name: str
    content: bytes


@dataclass(frozen=True)
class SourceReader:
    """Functions that return the images of a source file, in order, and their number. Both raise `AsgoError`."""

    read: Callable[[Path], Iterable[StreamedImage]]
    count: Callable[[Path], int]


class Parts:
    """A folder with the index of each source file that is done, and the digest of its images if they are packed."""

    def __init__(self, folder: Path, class_ids: Sequence[str]) -> None:
        """`class_ids` are all classes, sorted."""
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self.class_ids = tuple(class_ids)
        self._places = {class_id: place for place, class_id in enumerate(class_ids)}

    def label(self, path: Path, image: StreamedImage) -> int:
        """Return the label of an image in `path`. Raises `AsgoError` for an unknown class."""
        try:
            return self._places[image.class_id]
        except KeyError:
            raise AsgoError(
                f"{path}: {image.name} has the class {image.class_id}, which has no training images"
            ) from None

    def save(self, path: Path, rows: _Rows, sha256: str) -> None:
        """Record that `path` is done, with its images in order."""
        write_atomically(self._digest_file(path), sha256.encode())
        write_index(self._folder / path.name, build_index(rows.labels, rows.names, rows.sizes), self.class_ids)

    def load(self, path: Path) -> Index | None:
        """Return the images of `path`, with offsets from its first image; None if it is not done."""
        noted = self._folder / path.name
        return read_index(noted, self.class_ids) if noted.exists() else None

    def sha256(self, path: Path) -> str:
        """Return the digest that `save` recorded."""
        return self._digest_file(path).read_text()

    def joined(self, paths: Sequence[Path]) -> Index:
        """Return the index of all `paths`, which must be done, sorted by (class, name).

        Offsets are those of the concatenated images of all files. Raises `AsgoError` for two images with the same name.
        """
        parts = [part for path in paths if (part := self.load(path)) is not None]
        assert len(parts) == len(paths)
        whole = joined(parts)
        whole = Index(whole.labels, whole.names, np.cumsum(whole.sizes) - whole.sizes, whole.sizes)
        whole = whole.take(np.lexsort((whole.names, whole.labels)))
        twice = np.flatnonzero((whole.names[1:] == whole.names[:-1]) & (whole.labels[1:] == whole.labels[:-1]))
        if len(twice):
            raise AsgoError(f"{paths[0].parent}: two images are named {whole.names[twice[0]].decode()}")
        return whole

    def _digest_file(self, path: Path) -> Path:
        return self._folder / f"{path.name}.sha256"


@dataclass
class _Rows:
    """The images of a file that have been read."""

    labels: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def add(self, label: int, image: StreamedImage) -> None:
        self.labels.append(label)
        self.names.append(image.name)
        self.sizes.append(len(image.content))


def import_streams(
    files: Mapping[str, Sequence[Path]],
    reader: SourceReader,
    classes: tuple[ImageClass, ...],
    out: Path,
    layout: Layout,
    workers: int,
    report: Progress,
) -> Contents:
    """Write the images of `files` (by split) and their indices to `out`, or resume that; see `ImageImporter.make`."""
    parts = Parts(out / PARTS, [each.id for each in classes])
    _require_room(files, reader, out, layout, parts)
    indices = {}
    for split, paths in files.items():
        if layout == "extracted":
            extract_streams(paths, reader, out / split, parts, workers, report)
        else:
            pack_streams(paths, reader, out / packed_file(split), parts, report)
        index = parts.joined(paths)
        indices[split] = index if split == "train" else index.take(index.names.argsort(kind="stable"))
        write_index(out / index_file(split), indices[split], parts.class_ids)
    return Contents(classes, indices, _pieces(files, parts) if layout == "packed" else ())


def _require_room(
    files: Mapping[str, Sequence[Path]], reader: SourceReader, out: Path, layout: Layout, parts: Parts
) -> None:
    missing = [path for paths in files.values() for path in paths if parts.load(path) is None]
    needed = sum(path.stat().st_size for path in missing)
    if layout == "extracted":
        needed = on_disk(needed, sum(map(reader.count, missing)))
    require_room(out, needed, "choose another --out")


def _pieces(files: Mapping[str, Sequence[Path]], parts: Parts) -> tuple[Piece, ...]:
    return tuple(
        Piece(split=split, bytes=int(index.sizes.sum()), sha256=parts.sha256(path))
        for split, paths in files.items()
        for path in paths
        if (index := parts.load(path)) is not None
    )


def extract_streams(
    paths: Sequence[Path], reader: SourceReader, target: Path, parts: Parts, workers: int, progress: Progress
) -> None:
    """Write the images of `paths` to `target/<class id>/<name>`; keep existing ones.

    A class has images in every file, so all folders stay hidden, as `.<class id>.partial`, until the last file is done.
    Calls `progress` several times a second in this thread, with numbers of images; if it raises, the work ends.

    Raises `AsgoError` as the reader does, for two images with the same name and for another file in a folder, and
    `OSError` for disk errors.
    """
    target.mkdir(exist_ok=True)
    for folder in (target / class_id for class_id in parts.class_ids):
        if folder.exists():
            reopen(folder)
        make_partial_folder(folder)
    there = [sizes_in(partial_folder(target / class_id)) for class_id in parts.class_ids]
    total = sum(map(reader.count, paths))
    tally = Tally()
    jobs = [partial(_extract_file, path, reader, target, parts, there, tally) for path in paths]
    in_threads(jobs, workers, tally, lambda done: progress(f"extracting to {target.name}", done, total))
    whole = parts.joined(paths)
    expected = {label: expected_sizes(images) for label, images in whole.by_class()}
    for label, class_id in enumerate(parts.class_ids):
        require_only(expected.get(label, {}), partial_folder(target / class_id), there[label])
    for label, class_id in enumerate(parts.class_ids):
        if label in expected:
            publish(target / class_id, expected[label])
        else:
            partial_folder(target / class_id).rmdir()


def _extract_file(
    path: Path, reader: SourceReader, target: Path, parts: Parts, there: list[dict[str, int]], tally: Tally
) -> None:
    before = parts.load(path)
    if before is not None and _are_there(before, there):
        tally.advance(len(before))
        return
    rows = _Rows()
    for image in reader.read(path):
        label = parts.label(path, image)
        if there[label].get(image.name) != len(image.content):
            write_image(partial_folder(target / image.class_id) / image.name, image.content)
        rows.add(label, image)
        tally.advance(1)
    parts.save(path, rows, "")


def _are_there(images: Index, there: list[dict[str, int]]) -> bool:
    columns = zip(images.labels.tolist(), images.names.tolist(), images.sizes.tolist(), strict=True)
    return all(there[label].get(name.decode()) == size for label, name, size in columns)


def pack_streams(paths: Sequence[Path], reader: SourceReader, target: Path, parts: Parts, progress: Progress) -> None:
    """Concatenate the images of `paths`, without separators, to the file `target`.

    The file has a hidden name until it is complete. After a kill, source files recorded in `parts` are not read again,
    and the bytes after them are dropped. Calls `progress` for every image, with numbers of images.

    Raises `AsgoError` as the reader does and for two images with the same name, and `OSError` for disk errors.
    """
    packed = partial_folder(target)
    if target.exists():
        target.rename(packed)
    counts = list(map(reader.count, paths))
    finished, end = _finished(paths, packed, parts)
    done = itertools.count(sum(counts[:finished]))
    with open(packed, "ab", opener=refusing_links) as file:
        file.truncate(end)
        for path in paths[finished:]:
            rows, digest = _Rows(), hashlib.sha256()
            for image in reader.read(path):
                progress(f"copying to {target.name}", next(done), sum(counts))
                rows.add(parts.label(path, image), image)
                file.write(image.content)
                digest.update(image.content)
            file.flush()
            os.fsync(file.fileno())
            parts.save(path, rows, digest.hexdigest())
    parts.joined(paths)
    packed.rename(target)
    sync(target.parent)


def _finished(paths: Sequence[Path], packed: Path, parts: Parts) -> tuple[int, int]:
    """Return how many leading files are completely copied, and the byte offset where their images end."""
    length, end = packed.stat().st_size if packed.exists() else 0, 0
    for number, path in enumerate(paths):
        part = parts.load(path)
        if part is None or end + int(part.sizes.sum()) > length:
            return number, end
        end += int(part.sizes.sum())
    return len(paths), end
