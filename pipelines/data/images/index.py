"""Index of the images of a data set: `train.parquet` and `val.parquet`."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import AsgoError
from pipelines.storage import write_atomically

SPLITS: Final = ("train", "val")
_MOST_IMAGES = 20_000_000
_LONGEST_NAME = 255  # bytes; numpy allocates the longest name's length for every name
_COLUMNS = ["class", "name", "offset", "size"]
_OLD_COLUMNS = ["wnid", *_COLUMNS[1:]]
"""Columns in folders with a manifest of version 2."""


def index_file(split: str) -> str:
    """Return the file name of a split's index."""
    return f"{split}.parquet"


def packed_file(split: str) -> str:
    """Return the name of the file with a split's images, if they are neither separate files nor in the source files."""
    return f"{split}.images"


@dataclass(frozen=True)
class ImageClass:
    """A class: its id, such as n02119789, and its name, such as "kit fox"."""

    id: str
    name: str


@dataclass(frozen=True)
class Index:
    """The images of a split: `labels`, `offsets` and `sizes` are (images,) int64, `names` (images,) bytes in UTF-8.

    A label is the index of the class in the sorted class ids. An offset is in bytes, from the start of the file that
    holds the split's images, or would hold them if they were packed. Training images are sorted by (class, name),
    validation images by name.
    """

    labels: NDArray[np.int64]
    names: NDArray[np.bytes_]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, chosen: NDArray[np.int64]) -> Index:
        """Return the images with these indices."""
        return Index(self.labels[chosen], self.names[chosen], self.offsets[chosen], self.sizes[chosen])

    def by_class(self) -> Iterator[tuple[int, Index]]:
        """Yield each label that has images, with its images."""
        order = np.argsort(self.labels, kind="stable")
        for chosen in np.split(order, np.cumsum(np.bincount(self.labels))[:-1]):
            if len(chosen):
                yield int(self.labels[chosen[0]]), self.take(chosen)


def build_index(
    labels: Iterable[int], names: Sequence[str], sizes: Sequence[int], offsets: Sequence[int] | None = None
) -> Index:
    """Build an index from columns; without `offsets`, the images are contiguous."""
    lengths = np.array(sizes, dtype=np.int64)
    return Index(
        np.fromiter(labels, np.int64, len(names)),
        np.array([name.encode() for name in names], dtype=np.bytes_),
        np.cumsum(lengths) - lengths if offsets is None else np.array(offsets, dtype=np.int64),
        lengths,
    )


def joined(parts: Sequence[Index]) -> Index:
    """Concatenate `parts`; offsets are not changed."""
    return Index(*(np.concatenate(column) for column in zip(*map(_columns, parts), strict=True)))


def write_index(path: Path, index: Index, class_ids: Sequence[str]) -> None:
    """Write `index` atomically as a Parquet file with the columns class, name, offset and size."""
    import pyarrow
    from pyarrow import parquet

    classes = pyarrow.DictionaryArray.from_arrays(index.labels.astype(np.int32), list(class_ids))
    names = pyarrow.array(index.names).cast(pyarrow.string())
    table = pyarrow.table([classes, names, index.offsets, index.sizes], names=_COLUMNS)
    content = io.BytesIO()
    parquet.write_table(table, content, compression="zstd")
    write_atomically(path, content.getvalue())


def read_index(path: Path, class_ids: Sequence[str], sha256: str | None = None) -> Index:
    """Read an index. Raises `AsgoError` if it is missing or damaged, or its SHA-256 is not `sha256`."""
    import pyarrow.compute
    from pyarrow import parquet

    try:
        content = path.read_bytes()
        if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
            raise AsgoError(f"{path}: altered since it was written; make the folder again with --overwrite")
        metadata = parquet.read_metadata(io.BytesIO(content))
        if metadata.num_rows > _MOST_IMAGES:
            raise AsgoError(f"{path}: has more than {_MOST_IMAGES:,} rows, so it is not an index of images")
        columns = _OLD_COLUMNS if "wnid" in metadata.schema.names else _COLUMNS
        table = parquet.read_table(io.BytesIO(content), columns=columns, read_dictionary=columns[:2])
    except OSError as error:
        raise AsgoError(f"{path}: {error.strerror or error}; make the folder again with --overwrite") from None
    except pyarrow.ArrowException:
        raise AsgoError(f"{path}: damaged; make the folder again with --overwrite") from None
    classes, name, offset, size = (column.combine_chunks() for column in table.columns)
    if (pyarrow.compute.max(pyarrow.compute.binary_length(name.dictionary)).as_py() or 0) > _LONGEST_NAME:
        raise AsgoError(f"{path}: damaged; make the folder again with --overwrite")
    places = pyarrow.compute.index_in(classes.cast(pyarrow.string()), pyarrow.array(list(class_ids)))
    if places.null_count:
        raise AsgoError(f"{path}: has classes that are not in the labels; make the folder again with --overwrite")
    return Index(
        places.to_numpy().astype(np.int64),
        np.array(name.cast(pyarrow.binary()).to_pylist(), dtype=np.bytes_),
        offset.to_numpy(),
        size.to_numpy(),
    )


def fingerprint(class_ids: Sequence[str], indices: Iterable[Index], pixels: Iterable[str] = ()) -> str:
    """Return the SHA-256 of the classes and all images' names, sizes and labels.

    `pixels` are the digests of decoded images, whose sizes are all equal. Without them, the result does not depend on
    the layout.
    """
    digest = hashlib.sha256(json.dumps(list(class_ids)).encode())
    for index in indices:
        digest.update(b"\n".join(index.names.tolist()))
        digest.update(index.sizes.astype("<i8").tobytes())
        digest.update(index.labels.astype("<i8").tobytes())
    for each in pixels:
        digest.update(each.encode())
    return digest.hexdigest()


def _columns(index: Index) -> tuple[NDArray[np.int64], NDArray[np.bytes_], NDArray[np.int64], NDArray[np.int64]]:
    return index.labels, index.names, index.offsets, index.sizes
