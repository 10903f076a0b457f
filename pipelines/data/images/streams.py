"""Import images that are read as streams from source files, to one folder per class or one file per split."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

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
from pipelines.data.images.manifest import ImageShape, Layout, Piece
from pipelines.data.images.pixels import common_shape, decode_to, write_pixels
from pipelines.data.progress import Progress, Tally, in_threads
from pipelines.errors import AsgoError
from pipelines.storage import refusing_links, sync, write_atomically

T = TypeVar("T")


class StreamedImage(NamedTuple):
    """An image: its class, its file name (`n01440764_10026.JPEG`) and the bytes of the file."""

    class_id: str
    name: str
    content: bytes


def _bytes_of(file: Any) -> int:
    return int(Path(file).stat().st_size)


@dataclass(frozen=True)
class SourceReader(Generic[T]):
    """Functions of a part of the source, such as a file: its images, in order, their number, and its size in bytes.

    The first two raise `AsgoError`. Error messages show `str(part)`.
    """

    read: Callable[[T], Iterable[StreamedImage]]
    count: Callable[[T], int]
    bytes: Callable[[T], int] = _bytes_of


class Parts:
    """A folder with the index of each part of a split that is done, and the digest of its images if they are packed.

    A part is given by its number in the split.
    """

    def __init__(self, folder: Path, class_ids: Sequence[str], sources: Sequence[object]) -> None:
        """`class_ids` are all classes, sorted; `sources` are the parts of the split, for messages."""
        folder.mkdir(exist_ok=True, parents=True)
        self._folder = folder
        self._where = os.path.commonpath([str(source) for source in sources])
        self.class_ids = tuple(class_ids)
        self._places = {class_id: place for place, class_id in enumerate(class_ids)}

    def label(self, part: object, image: StreamedImage) -> int:
        """Return the label of an image in `part`. Raises `AsgoError` for an unknown class."""
        try:
            return self._places[image.class_id]
        except KeyError:
            raise AsgoError(
                f"{part}: {image.name} has the class {image.class_id}, which has no training images"
            ) from None

    def save(self, number: int, rows: _Rows, sha256: str) -> None:
        """Record that a part is done, with its images in order."""
        write_atomically(self._digest_file(number), sha256.encode())
        write_index(self._index_file(number), build_index(rows.labels, rows.names, rows.sizes), self.class_ids)

    def load(self, number: int) -> Index | None:
        """Return the images of a part, with offsets from its first image; None if it is not done."""
        noted = self._index_file(number)
        return read_index(noted, self.class_ids) if noted.exists() else None

    def sha256(self, number: int) -> str:
        """Return the digest that `save` recorded."""
        return self._digest_file(number).read_text()

    def joined(self, count: int) -> Index:
        """Return the index of all `count` parts, which must be done, sorted by (class, name).

        Offsets are those of the concatenated images of all parts. Raises `AsgoError` for two images with the same name.
        """
        parts = [part for number in range(count) if (part := self.load(number)) is not None]
        assert len(parts) == count
        whole = joined(parts)
        whole = Index(whole.labels, whole.names, np.cumsum(whole.sizes) - whole.sizes, whole.sizes)
        whole = whole.take(np.lexsort((whole.names, whole.labels)))
        twice = np.flatnonzero((whole.names[1:] == whole.names[:-1]) & (whole.labels[1:] == whole.labels[:-1]))
        if len(twice):
            class_id, name = self.class_ids[whole.labels[twice[0]]], whole.names[twice[0]].decode()
            raise AsgoError(f"{self._where}: two images of the class {class_id} are named {name}")
        return whole

    def _index_file(self, number: int) -> Path:
        return self._folder / f"{number:06d}.parquet"

    def _digest_file(self, number: int) -> Path:
        return self._folder / f"{number:06d}.sha256"


@dataclass
class _Rows:
    """The images of a part that have been read."""

    labels: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def add(self, label: int, image: StreamedImage) -> None:
        self.labels.append(label)
        self.names.append(image.name)
        self.sizes.append(len(image.content))


def import_streams(
    sources: Mapping[str, Sequence[T]],
    reader: SourceReader[T],
    classes: tuple[ImageClass, ...],
    out: Path,
    layout: Layout,
    workers: int,
    report: Progress,
) -> Contents:
    """Write the images and their indices to `out`, or resume that; see `ImageImporter.make`.

    `sources` are the parts of the source by split, with all images of the split.
    """
    class_ids = [each.id for each in classes]
    parts = {split: Parts(out / PARTS / split, class_ids, those) for split, those in sources.items()}
    shape = common_shape(all_images(sources, reader, report)) if layout == "auto" else None
    _require_room(sources, reader, out, layout, parts, shape)
    indices, pieces = {}, []
    for split, those in sources.items():
        if shape is not None:
            index, piece = _decode_streams(split, those, reader, out, parts[split], shape, report)
            pieces.append(piece)
        elif layout == "extracted":
            extract_streams(those, reader, out / split, parts[split], workers, report)
            index = _in_order(split, parts[split].joined(len(those)))
        else:
            pack_streams(those, reader, out / packed_file(split), parts[split], report)
            index = _in_order(split, parts[split].joined(len(those)))
            pieces += _pieces(split, len(those), parts[split])
        write_index(out / index_file(split), index, class_ids)
        indices[split] = index
    return Contents(classes, indices, tuple(pieces), image_shape=shape)


def all_images(
    sources: Mapping[str, Sequence[T]], reader: SourceReader[T], report: Progress
) -> Iterator[tuple[str, bytes]]:
    """Yield the name and content of every image."""
    total, done = sum(reader.count(each) for those in sources.values() for each in those), itertools.count(1)
    for those in sources.values():
        for source in those:
            for image in reader.read(source):
                yield f"{image.class_id}/{image.name}", image.content
                report("comparing the sizes of the images", next(done), total)


def _in_order(split: str, index: Index) -> Index:
    """Sort validation images, which are sorted by (class, name), by name."""
    return index if split == "train" else index.take(index.names.argsort(kind="stable"))


def _require_room(
    sources: Mapping[str, Sequence[T]],
    reader: SourceReader[T],
    out: Path,
    layout: Layout,
    parts: Mapping[str, Parts],
    shape: ImageShape | None,
) -> None:
    missing = [each for split, those in sources.items() for n, each in enumerate(those) if parts[split].load(n) is None]
    needed = sum(map(reader.bytes, missing))
    if layout == "extracted":
        needed = on_disk(needed, sum(map(reader.count, missing)))
    if shape is not None:
        needed = 2 * math.prod(shape) * sum(map(reader.count, missing))
    require_room(out, needed, "choose another --out")


def _pieces(split: str, count: int, parts: Parts) -> list[Piece]:
    return [
        Piece(split=split, bytes=int(index.sizes.sum()), sha256=parts.sha256(number))
        for number in range(count)
        if (index := parts.load(number)) is not None
    ]


def extract_streams(
    sources: Sequence[T], reader: SourceReader[T], target: Path, parts: Parts, workers: int, progress: Progress
) -> None:
    """Write the images of `sources` to `target/<class id>/<name>`; keep existing ones.

    A class may have images in every part, so all folders stay hidden, as `.<class id>.partial`, until the last part is
    done. Calls `progress` several times a second in this thread, with numbers of images; if it raises, the work ends.

    Raises `AsgoError` as the reader does, for two images with the same name and for another file in a folder, and
    `OSError` for disk errors.
    """
    target.mkdir(exist_ok=True)
    for folder in (target / class_id for class_id in parts.class_ids):
        if folder.exists():
            reopen(folder)
        make_partial_folder(folder)
    there = [sizes_in(partial_folder(target / class_id)) for class_id in parts.class_ids]
    total = sum(map(reader.count, sources))
    tally = Tally()
    jobs = [partial(_extract_part, n, each, reader, target, parts, there, tally) for n, each in enumerate(sources)]
    in_threads(jobs, workers, tally, lambda done: progress(f"extracting to {target.name}", done, total))
    whole = parts.joined(len(sources))
    expected = {label: expected_sizes(images) for label, images in whole.by_class()}
    for label, class_id in enumerate(parts.class_ids):
        require_only(expected.get(label, {}), partial_folder(target / class_id), there[label])
    for label, class_id in enumerate(parts.class_ids):
        if label in expected:
            publish(target / class_id, expected[label])
        else:
            partial_folder(target / class_id).rmdir()


def _extract_part(
    number: int,
    source: T,
    reader: SourceReader[T],
    target: Path,
    parts: Parts,
    there: list[dict[str, int]],
    tally: Tally,
) -> None:
    before = parts.load(number)
    if before is not None and _are_there(before, there):
        tally.advance(len(before))
        return
    rows = _Rows()
    for image in reader.read(source):
        label = parts.label(source, image)
        if there[label].get(image.name) != len(image.content):
            write_image(partial_folder(target / image.class_id) / image.name, image.content)
        rows.add(label, image)
        tally.advance(1)
    parts.save(number, rows, "")


def _are_there(images: Index, there: list[dict[str, int]]) -> bool:
    columns = zip(images.labels.tolist(), images.names.tolist(), images.sizes.tolist(), strict=True)
    return all(there[label].get(name.decode()) == size for label, name, size in columns)


def pack_streams(sources: Sequence[T], reader: SourceReader[T], target: Path, parts: Parts, progress: Progress) -> None:
    """Concatenate the images of `sources`, without separators, to the file `target`.

    The file has a hidden name until it is complete. After a kill, parts recorded in `parts` are not read again, and the
    bytes after them are dropped. Calls `progress` for every image, with numbers of images.

    Raises `AsgoError` as the reader does and for two images with the same name, and `OSError` for disk errors.
    """
    packed = partial_folder(target)
    if target.exists():
        target.rename(packed)
    counts = list(map(reader.count, sources))
    finished, end = _finished(len(sources), packed, parts)
    done = itertools.count(sum(counts[:finished]))
    with open(packed, "ab", opener=refusing_links) as file:
        file.truncate(end)
        for number, source in enumerate(sources[finished:], start=finished):
            rows, digest = _Rows(), hashlib.sha256()
            for image in reader.read(source):
                progress(f"copying to {target.name}", next(done), sum(counts))
                rows.add(parts.label(source, image), image)
                file.write(image.content)
                digest.update(image.content)
            file.flush()
            os.fsync(file.fileno())
            parts.save(number, rows, digest.hexdigest())
    parts.joined(len(sources))
    packed.rename(target)
    sync(target.parent)


def _finished(count: int, packed: Path, parts: Parts) -> tuple[int, int]:
    """Return how many leading parts are completely copied, and the byte offset where their images end."""
    length, end = packed.stat().st_size if packed.exists() else 0, 0
    for number in range(count):
        part = parts.load(number)
        if part is None or end + int(part.sizes.sum()) > length:
            return number, end
        end += int(part.sizes.sum())
    return count, end


def _decode_streams(
    split: str,
    sources: Sequence[T],
    reader: SourceReader[T],
    out: Path,
    parts: Parts,
    shape: ImageShape,
    report: Progress,
) -> tuple[Index, Piece]:
    """Write the pixels of a split, first in the order of the source to a temporary file, then in that of the index."""

    def decoded(source: T) -> Iterator[StreamedImage]:
        return (
            each._replace(content=decode_to(shape, f"{each.class_id}/{each.name}", each.content))
            for each in reader.read(source)
        )

    as_read = out / PARTS / packed_file(split)
    pack_streams(sources, replace(reader, read=decoded), as_read, parts, report)
    index = _in_order(split, parts.joined(len(sources)))
    size = math.prod(shape)
    pixels = np.memmap(as_read, np.uint8, "r", shape=(len(index), *shape))
    sha256 = write_pixels(out / packed_file(split), pixels, index.offsets // size, report)
    in_place = Index(index.labels, index.names, np.arange(len(index)) * size, index.sizes)
    return in_place, Piece(split=split, bytes=len(index) * size, sha256=sha256)
