"""ImageNet as two sets of labelled images, whether they are files or lie in the archives."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.data.imagenet.archives import ARCHIVES
from pipelines.data.imagenet.index import Index, index_file, packed_file, read_index
from pipelines.data.imagenet.labels import ImageClass
from pipelines.data.imagenet.manifest import ImagenetManifest, command, load_imagenet_manifest
from pipelines.errors import AsgoError


class ImageSet(Protocol):
    """Images of a split with their labels; may be read by several threads at once, and pickled for other processes."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """(images,): the class's place among the sorted WordNet ids."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Such as n01440764/n01440764_10026.JPEG."""

    def read(self, index: int) -> bytes:
        """The bytes of the file. Raises `AsgoError` with its name when it cannot be read whole."""


@dataclass(frozen=True)
class ImagenetData:
    """What `open_imagenet` gives. Training images are ordered by (class, name), validation images by name."""

    folder: Path
    classes: tuple[ImageClass, ...]
    fingerprint: str
    train: ImageSet
    validation: ImageSet


def open_imagenet(folder: Path) -> ImagenetData:
    """Open what `prepare_imagenet` made.

    Raises `UsageError` when there is no such folder, and `AsgoError` when it is incomplete (with the command that goes
    on), damaged, or the archives it reads from are gone.
    """
    manifest = load_imagenet_manifest(folder)
    wnids = [each.wnid for each in manifest.classes]
    sets: dict[str, ImageSet] = {}
    for split, sha256 in (("train", manifest.train_index), ("val", manifest.validation_index)):
        index = read_index(folder / index_file(split), wnids, sha256)
        if manifest.layout == "extracted":
            sets[split] = _in_folder(folder / split, index, wnids)
        elif manifest.origin == "archives":
            sets[split] = _in_archive(folder, manifest, split, index, wnids)
        else:
            sets[split] = _in_copy(folder / packed_file(split), index, wnids)
    classes = tuple(ImageClass(each.wnid, each.name) for each in manifest.classes)
    return ImagenetData(folder, classes, manifest.fingerprint, sets["train"], sets["val"])


class _Images:
    """What both kinds have in common."""

    def __init__(self, index: Index, wnids: Sequence[str]) -> None:
        self._index = index
        self._wnids = tuple(wnids)

    @property
    def labels(self) -> NDArray[np.int64]:
        return self._index.labels

    def __len__(self) -> int:
        return len(self._index)

    def name(self, index: int) -> str:
        return f"{self._wnids[self._index.labels[index]]}/{self._index.names[index].decode()}"


class FolderImages(_Images):
    """Images in files `<folder>/<wnid>/<name>`."""

    def __init__(self, folder: Path, index: Index, wnids: Sequence[str]) -> None:
        super().__init__(index, wnids)
        self._folder = str(folder)

    def read(self, index: int) -> bytes:
        path, size = f"{self._folder}/{self.name(index)}", int(self._index.sizes[index])
        try:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                # Before memory is taken for it: the size is the index's.
                content = os.read(descriptor, size) if os.fstat(descriptor).st_size == size else b""
            finally:
                os.close(descriptor)
        except OSError as error:
            raise AsgoError(f"{path}: {error.strerror}") from None
        if len(content) != size:
            raise AsgoError(f"{path}: {size:,} bytes long when it was extracted, and not now; make the folder again")
        return content


class ArchiveImages(_Images):
    """Images read in place from an archive, or from the one file that all of a split were copied to.

    Each process opens the file at its first read.
    """

    _opening = threading.Lock()

    def __init__(self, archive: Path, index: Index, wnids: Sequence[str]) -> None:
        super().__init__(index, wnids)
        self._archive = archive
        self._descriptor: int | None = None

    def read(self, index: int) -> bytes:
        descriptor = self._descriptor if self._descriptor is not None else self._open()
        size = int(self._index.sizes[index])
        offset = int(self._index.offsets[index])
        try:
            content = os.pread(descriptor, size, offset) if offset + size <= os.fstat(descriptor).st_size else b""
        except OSError as error:
            raise AsgoError(f"{self._archive}: {self.name(index)}: {error.strerror}") from None
        if len(content) != size:
            raise AsgoError(f"{self._archive}: ends in {self.name(index)}; it was cut since it was indexed")
        return content

    def _open(self) -> int:
        with self._opening:
            if self._descriptor is None:
                try:
                    self._descriptor = os.open(self._archive, os.O_RDONLY)
                except OSError as error:
                    raise AsgoError(f"{self._archive}: {error.strerror}") from None
            return self._descriptor

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)  # type: ignore[arg-type]


def _in_archive(
    folder: Path, manifest: ImagenetManifest, split: str, index: Index, wnids: Sequence[str]
) -> ArchiveImages:
    path = Path(manifest.archives_folder) / ARCHIVES[split].file
    size = next(archive.bytes for archive in manifest.archives if archive.file == path.name)
    if not path.is_file() or path.stat().st_size != size:
        what = "not there any more" if not path.is_file() else f"{path.stat().st_size:,} bytes long, not {size:,}"
        again = command(folder, {**manifest.recipe, "archives": "FOLDER"})
        raise AsgoError(f"{path}: {what}; put it back, or give its new folder with: {again} --overwrite")
    return ArchiveImages(path, index, wnids)


def _in_copy(path: Path, index: Index, wnids: Sequence[str]) -> ArchiveImages:
    size = int(index.sizes.sum())
    if not path.is_file() or path.stat().st_size != size:
        what = "not there any more" if not path.is_file() else f"{path.stat().st_size:,} bytes long, not {size:,}"
        raise AsgoError(f"{path}: {what}; make the folder again with --overwrite")
    return ArchiveImages(path, index, wnids)


def _in_folder(folder: Path, index: Index, wnids: Sequence[str]) -> FolderImages:
    for label in np.unique(index.labels):
        if not (folder / wnids[label]).is_dir():
            raise AsgoError(f"{folder / wnids[label]}: not there any more; make the folder again with --overwrite")
    return FolderImages(folder, index, wnids)
