"""Open a data set as two sets of labelled images, stored as separate files or in one file."""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.data.images.index import ImageClass, Index, index_file, packed_file, read_index
from pipelines.data.images.manifest import SOURCE, ImageManifest, command, load_image_manifest
from pipelines.errors import AsgoError


class ImageSet(Protocol):
    """Images of a split with their labels. Thread-safe, and picklable for other processes."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """(images,): the index of the class in the sorted class ids."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return the image's name, such as n01440764/n01440764_10026.JPEG."""

    def read(self, index: int) -> bytes:
        """Return the bytes of the file. Raises `AsgoError` with its name if it cannot be read completely."""


@dataclass(frozen=True)
class ImageData:
    """An open data set. Training images are sorted by (class, name), validation images by name.

    Both sets are `DecodedImages`, or neither.
    """

    folder: Path
    classes: tuple[ImageClass, ...]
    fingerprint: str
    train: ImageSet
    validation: ImageSet


def open_images(folder: Path) -> ImageData:
    """Open a folder that `import_images` made.

    Raises `UsageError` if the folder does not exist, and `AsgoError` if it is incomplete (with the command that
    resumes), damaged, or the source files that it reads are missing.
    """
    manifest = load_image_manifest(folder)
    sets: dict[str, ImageSet] = {}
    for split, sha256 in (("train", manifest.train_index), ("val", manifest.validation_index)):
        index = read_index(folder / index_file(split), manifest.class_ids, sha256)
        if manifest.layout == "extracted":
            sets[split] = _extracted(folder / split, index, manifest.class_ids)
        elif manifest.image_shape is not None:
            sets[split] = _decoded(folder / packed_file(split), index, manifest.class_ids, manifest.image_shape)
        else:
            sets[split] = _packed(folder, manifest, split, index)
    classes = tuple(ImageClass(each.id, each.name) for each in manifest.classes)
    return ImageData(folder, classes, manifest.fingerprint, sets["train"], sets["val"])


class _Images:
    """Base class of the two kinds of image sets."""

    def __init__(self, index: Index, class_ids: Sequence[str]) -> None:
        self._index = index
        self._class_ids = tuple(class_ids)

    @property
    def labels(self) -> NDArray[np.int64]:
        return self._index.labels

    def __len__(self) -> int:
        return len(self._index)

    def name(self, index: int) -> str:
        return f"{self._class_ids[self._index.labels[index]]}/{self._index.names[index].decode()}"


class FolderImages(_Images):
    """Images in files `<folder>/<class id>/<name>`."""

    def __init__(self, folder: Path, index: Index, class_ids: Sequence[str]) -> None:
        super().__init__(index, class_ids)
        self._folder = str(folder)

    def read(self, index: int) -> bytes:
        path, size = f"{self._folder}/{self.name(index)}", int(self._index.sizes[index])
        try:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                # `os.read` allocates `size` bytes, and a damaged index may say any size: compare first.
                content = os.read(descriptor, size) if os.fstat(descriptor).st_size == size else b""
            finally:
                os.close(descriptor)
        except OSError as error:
            raise AsgoError(f"{path}: {error.strerror}") from None
        if len(content) != size:
            raise AsgoError(f"{path}: no longer {size:,} bytes, as when it was extracted; make the folder again")
        return content


class PackedImages(_Images):
    """Images read in place from one file that holds all images of a split.

    Each process opens the file at its first read.
    """

    _opening = threading.Lock()

    def __init__(self, path: Path, index: Index, class_ids: Sequence[str]) -> None:
        super().__init__(index, class_ids)
        self._path = path
        self._descriptor: int | None = None

    def read(self, index: int) -> bytes:
        descriptor = self._descriptor if self._descriptor is not None else self._open()
        size = int(self._index.sizes[index])
        offset = int(self._index.offsets[index])
        try:
            content = os.pread(descriptor, size, offset) if offset + size <= os.fstat(descriptor).st_size else b""
        except OSError as error:
            raise AsgoError(f"{self._path}: {self.name(index)}: {error.strerror}") from None
        if len(content) != size:
            raise AsgoError(f"{self._path}: ends in {self.name(index)}; it was truncated after it was indexed")
        return content

    def _open(self) -> int:
        with self._opening:
            if self._descriptor is None:
                try:
                    self._descriptor = os.open(self._path, os.O_RDONLY)
                except OSError as error:
                    raise AsgoError(f"{self._path}: {error.strerror}") from None
            return self._descriptor

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)  # type: ignore[arg-type]


class DecodedImages(_Images):
    """Decoded images of one shape, in a memory-mapped file. `read` returns the raw pixels."""

    def __init__(self, path: Path, index: Index, class_ids: Sequence[str], shape: tuple[int, int, int]) -> None:
        super().__init__(index, class_ids)
        self._path = path
        self._shape = shape

    @functools.cached_property
    def pixels(self) -> NDArray[np.uint8]:
        """(images, height, width, channels), read-only; 1 or 3 channels."""
        if not len(self):
            return np.empty((0, *self._shape), np.uint8)  # an empty file cannot be mapped
        return np.memmap(self._path, np.uint8, "r", shape=(len(self), *self._shape))

    def read(self, index: int) -> bytes:
        return bytes(self.pixels[index].data)

    def __getstate__(self) -> dict[str, Any]:
        # Other processes map the file themselves.
        return {name: value for name, value in self.__dict__.items() if name != "pixels"}


def _decoded(path: Path, index: Index, class_ids: Sequence[str], shape: tuple[int, int, int]) -> DecodedImages:
    size = len(index) * math.prod(shape)
    if not path.is_file() or path.stat().st_size != size:
        what = "missing" if not path.is_file() else f"{path.stat().st_size:,} bytes long, not {size:,}"
        raise AsgoError(f"{path}: {what}; make the folder again with --overwrite")
    return DecodedImages(path, index, class_ids, shape)


def _packed(folder: Path, manifest: ImageManifest, split: str, index: Index) -> PackedImages:
    if split in manifest.containers:
        path = Path(manifest.source_folder) / manifest.containers[split]
        size = next((each.bytes for each in manifest.source_files if each.file == path.name), 0)
        place = {SOURCE: "ARCHIVE"} if SOURCE in manifest.recipe else {"archives": "FOLDER"}
        moved = manifest.model_copy(update={"recipe": {**manifest.recipe, **place}})
        advice = f"restore it, or pass its new place with: {command(folder, moved)} --overwrite"
    else:
        path, size = folder / packed_file(split), int(index.sizes.sum())
        advice = "make the folder again with --overwrite"
    if not path.is_file() or path.stat().st_size != size:
        what = "missing" if not path.is_file() else f"{path.stat().st_size:,} bytes long, not {size:,}"
        raise AsgoError(f"{path}: {what}; {advice}")
    return PackedImages(path, index, manifest.class_ids)


def _extracted(folder: Path, index: Index, class_ids: Sequence[str]) -> FolderImages:
    for label in np.unique(index.labels):
        if not (folder / class_ids[label]).is_dir():
            raise AsgoError(f"{folder / class_ids[label]}: missing; make the data folder again with --overwrite")
    return FolderImages(folder, index, class_ids)
