"""Where every image lies in the archives: `train.parquet` and `val.parquet`."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pipelines.data.imagenet.archives import Progress
from pipelines.data.imagenet.labels import Labels
from pipelines.data.imagenet.members import Member, Tar, read_members
from pipelines.errors import AsgoError
from pipelines.storage import write_atomically

SPLITS: Final = ("train", "val")
_SUFFIXES = (".jpeg", ".jpg", ".png")
_READERS = 8
"""Threads, where headers come from a disk: there one alone takes two to four times as long. Where they come from the
cache, several take twice as long as one, because they wait for the interpreter's lock at every header."""

_SLOW_S = 50e-6
"""Seconds a header from which on it came from a disk; one from the cache takes 10 µs."""
_NOTE = "._"
_MOST_IMAGES = 20_000_000
_LONGEST_NAME = 255  # bytes; numpy takes as many for every name
_COLUMNS = ["wnid", "name", "offset", "size"]


def index_file(split: str) -> str:
    """File name of a split's index."""
    return f"{split}.parquet"


def packed_file(split: str) -> str:
    """File name of a split's pictures, one after another, where they are neither files nor in the archives."""
    return f"{split}.images"


@dataclass(frozen=True)
class Index:
    """The images of a split: `labels`, `offsets` and `sizes` are (images,) int64, `names` (images,) bytes in UTF-8.

    A label is the class's place among the sorted WordNet ids, an offset counts from the beginning of the archive,
    or of the file that the hub's pictures are, or would be, copied to.
    Training images are in the order of (class, name), validation images in that of their names.
    """

    labels: NDArray[np.int64]
    names: NDArray[np.bytes_]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, chosen: NDArray[np.int64]) -> Index:
        """The images with these indices."""
        return Index(self.labels[chosen], self.names[chosen], self.offsets[chosen], self.sizes[chosen])

    def by_class(self) -> Iterator[tuple[int, Index]]:
        """The labels that images have, each with its images."""
        order = np.argsort(self.labels, kind="stable")
        for chosen in np.split(order, np.cumsum(np.bincount(self.labels))[:-1]):
            if len(chosen):
                yield int(self.labels[chosen[0]]), self.take(chosen)


def build_train_index(tar: Tar, labels: Labels, progress: Progress) -> Index:
    """The index of the archive of training images, which holds a tar archive a class.

    Raises `AsgoError` for a class too many or too few, and what `read_members` refuses.
    """
    archives = [tar.inside(member) for member in _class_archives(tar, labels)]
    began = time.perf_counter()
    skipped: list[str] = []
    parts = [_index_class(archives[0], 0, skipped)]
    is_slow = time.perf_counter() - began > _SLOW_S * len(parts[0])
    with ThreadPoolExecutor(_READERS if is_slow else 1) as pool:
        try:
            for part in pool.map(_index_class, archives[1:], range(1, len(archives)), itertools.repeat(skipped)):
                parts.append(part)
                progress("indexing the training images", len(parts), len(archives))
        finally:
            pool.shutdown(cancel_futures=True)
    _tell_skipped(skipped, progress)
    return Index(*(np.concatenate(column) for column in zip(*map(_columns, parts), strict=True)))


def _index_class(tar: Tar, label: int, skipped: list[str]) -> Index:
    members = sorted(_read_files(tar, skipped))
    if not members:
        tar.refuse("holds no images")
    return _index(tar, members, itertools.repeat(label, len(members)))


def build_validation_index(tar: Tar, labels: Labels, progress: Progress) -> Index:
    """The index of the archive of validation images, which are numbered from 1 on.

    Raises `AsgoError` when they are not those that the development kit has labels for, and what `read_members` refuses.
    """
    progress("indexing the validation images", 0, 1)
    skipped: list[str] = []
    members = {member.name: member for member in _read_files(tar, skipped)}
    _tell_skipped(skipped, progress)
    names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, len(labels.validation) + 1)]
    _require_same(tar, members, names, "image")
    places = {each.wnid: label for label, each in enumerate(labels.classes)}
    return _index(tar, [members[name] for name in names], (places[wnid] for wnid in labels.validation))


def write_index(path: Path, index: Index, wnids: Sequence[str]) -> None:
    """Write `index` as a Parquet file with the columns wnid, name, offset and size, whole or not at all."""
    import pyarrow
    from pyarrow import parquet

    wnid = pyarrow.DictionaryArray.from_arrays(index.labels.astype(np.int32), list(wnids))
    names = pyarrow.array(index.names).cast(pyarrow.string())
    table = pyarrow.table([wnid, names, index.offsets, index.sizes], names=_COLUMNS)
    content = io.BytesIO()
    parquet.write_table(table, content, compression="zstd")
    write_atomically(path, content.getvalue())


def read_index(path: Path, wnids: Sequence[str], sha256: str | None = None) -> Index:
    """Read what `write_index` wrote. Raises `AsgoError` when it is missing, damaged or not the one with `sha256`."""
    import pyarrow.compute
    from pyarrow import parquet

    try:
        content = path.read_bytes()
        if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
            raise AsgoError(f"{path}: altered since it was written; make the folder again with --overwrite")
        if parquet.read_metadata(io.BytesIO(content)).num_rows > _MOST_IMAGES:
            raise AsgoError(f"{path}: claims more than {_MOST_IMAGES:,} images; is it an index?")
        table = parquet.read_table(io.BytesIO(content), columns=_COLUMNS, read_dictionary=["wnid", "name"])
    except OSError as error:
        raise AsgoError(f"{path}: {error.strerror or error}; make the folder again with --overwrite") from None
    except pyarrow.ArrowException:
        raise AsgoError(f"{path}: damaged; make the folder again with --overwrite") from None
    wnid, name, offset, size = (column.combine_chunks() for column in table.columns)
    if (pyarrow.compute.max(pyarrow.compute.binary_length(name.dictionary)).as_py() or 0) > _LONGEST_NAME:
        raise AsgoError(f"{path}: damaged; make the folder again with --overwrite")
    places = pyarrow.compute.index_in(wnid.cast(pyarrow.string()), pyarrow.array(list(wnids)))
    if places.null_count:
        raise AsgoError(f"{path}: has classes that the labels lack; make the folder again with --overwrite")
    return Index(
        places.to_numpy().astype(np.int64),
        np.array(name.cast(pyarrow.binary()).to_pylist(), dtype=np.bytes_),
        offset.to_numpy(),
        size.to_numpy(),
    )


def fingerprint(wnids: Sequence[str], indices: Iterable[Index]) -> str:
    """SHA-256 over the classes and all images' names, sizes and labels: the same for extracted images and archives."""
    digest = hashlib.sha256(json.dumps(list(wnids)).encode())
    for index in indices:
        digest.update(b"\n".join(index.names.tolist()))
        digest.update(index.sizes.astype("<i8").tobytes())
        digest.update(index.labels.astype("<i8").tobytes())
    return digest.hexdigest()


def _class_archives(tar: Tar, labels: Labels) -> list[Member]:
    members = {member.name: member for member in _read_files(tar, [])}
    names = [f"{each.wnid}.tar" for each in labels.classes]
    _require_same(tar, members, names, "class archive")
    return [members[name] for name in names]


def _read_files(tar: Tar, skipped: list[str]) -> list[Member]:
    """The members, without macOS's notes on others (AppleDouble), such as `._n01440764_10026.JPEG`: to `skipped`."""
    members = read_members(tar)
    skipped += [member.name for member in members if member.name.startswith(_NOTE)]
    return [member for member in members if not member.name.startswith(_NOTE)]


def _tell_skipped(skipped: Sequence[str], progress: Progress) -> None:
    if skipped:
        progress(f"skipping {len(skipped):,} files of macOS, such as {skipped[0]}", 1, 1)


def _require_same(tar: Tar, found: Mapping[str, Member], wanted: Sequence[str], what: str) -> None:
    expected = set(wanted)
    for name in found:
        if name not in expected:
            tar.refuse(f"{name} is no {what} that the development kit knows")
    for name in wanted:
        if name not in found:
            tar.refuse(f"the {what} {name} is missing")


def _index(tar: Tar, members: Sequence[Member], labels: Iterable[int]) -> Index:
    for member in members:
        if not member.name.lower().endswith(_SUFFIXES):
            tar.refuse(f"member {member.name} is not named as an image")
    return Index(
        np.fromiter(labels, np.int64, len(members)),
        np.array([member.name.encode() for member in members], dtype=np.bytes_),
        np.array([member.offset for member in members], dtype=np.int64),
        np.array([member.size for member in members], dtype=np.int64),
    )


def _columns(index: Index) -> tuple[NDArray[np.int64], NDArray[np.bytes_], NDArray[np.int64], NDArray[np.int64]]:
    return index.labels, index.names, index.offsets, index.sizes
