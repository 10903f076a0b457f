"""Import data sets of torchvision that are image files; torchvision's classes list them, and decode nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.data.image_sources.files import File, LocalFiles
from pipelines.data.image_sources.files_importer import FilesImporter
from pipelines.data.image_sources.labels import WHOLE, Found, Images
from pipelines.data.images.manifest import SOURCE
from pipelines.data.images.pixels import numbered_classes
from pipelines.data.progress import Progress
from pipelines.data.retries import Notify
from pipelines.errors import AsgoError, UsageError


class _Kind(NamedTuple):
    """The folder of a data set below torchvision's `root`, and torchvision's names of its splits, if it has any."""

    folder: str
    train: str | None = None
    validation: str | None = None


FILE_SETS = {
    "Country211": _Kind("country211", "train", "valid"),
    "DTD": _Kind("dtd", "train", "val"),
    "EuroSAT": _Kind("eurosat"),
    "FGVCAircraft": _Kind("fgvc-aircraft-2013b", "train", "val"),
    "Flowers102": _Kind("flowers-102", "train", "val"),
    "Food101": _Kind("food-101", "train", "test"),
    "Imagenette": _Kind("imagenette2", "train", "val"),
    "RenderedSST2": _Kind("rendered-sst2", "train", "val"),
    "StanfordCars": _Kind("stanford_cars", "train", "test"),
    "SUN397": _Kind("SUN397"),
}
"""Data sets of torchvision whose classes take a `loader`."""


class TorchvisionFilesImporter(FilesImporter):
    """Imports one of `FILE_SETS` from `root`, where torchvision has unpacked it; see `ImageImporter`."""

    def __init__(self, name: str, root: Path, notify: Notify, **options: Any) -> None:
        """`options` are those of `FilesImporter`."""
        super().__init__(root / FILE_SETS[name].folder, notify, **options)
        self._root = root.resolve()
        self._kind = FILE_SETS[name]
        self.dataset = name
        self.folder = self._path
        self.options = {**self.options, SOURCE: f"torchvision:{name}", "root": str(self._root)}

    def download(self, progress: Progress, notify: Notify) -> list[str]:
        """Let torchvision download and unpack what is missing. Raises `AsgoError` if that fails."""
        for split in self._splits():
            self._open(split, download=True)
        return []

    def _list(self, report: Progress) -> Found:
        self._source = LocalFiles(self._path)
        images: dict[str, Images] = {}
        names: dict[str, str] = {}
        for key, split in self._splits().items():
            dataset = self._open(split)
            classes = numbered_classes([_name(each) for each in dataset.classes])
            names |= {each.id: each.name for each in classes}
            images[key] = {each.id: {} for each in classes}
            for path, label in self._samples(dataset, report):
                files = images[key][classes[label].id]
                name = path.name if path.name not in files else f"{path.parent.name}_{path.name}"
                files[name] = self._file(path)
        return Found(images, names)

    def _splits(self) -> dict[str, str | None]:
        if self._kind.train is None:
            return {WHOLE: None}
        return {"train": self._kind.train, "val": self._kind.validation}

    def _open(self, split: str | None, download: bool = False) -> Any:
        from torchvision import datasets  # takes seconds

        arguments = {} if split is None else {"split": split}
        try:
            return getattr(datasets, self.dataset)(self._root, download=download, loader=Path, **arguments)
        except (RuntimeError, ValueError, OSError, KeyError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            if download:
                raise AsgoError(f"{self._path}: torchvision cannot download {self.dataset} ({reason})") from None
            raise UsageError(
                f"{self._path}: not the files of {self.dataset} as torchvision unpacks them ({reason}); put them "
                "there, pass the folder that torchvision calls root with --root, or get them with --download"
            ) from None

    def _samples(self, dataset: Any, report: Progress) -> Iterator[tuple[Path, int]]:
        for index in range(len(dataset)):
            path, label = dataset[index]
            yield path, int(label)
            report("listing the images", index, len(dataset))

    def _file(self, path: Path) -> File:
        try:
            status = path.stat()
        except OSError as error:
            raise AsgoError(f"{path}: {error.strerror}") from None
        return File(os.path.relpath(path, self._path), status.st_size, str(path), status.st_mtime_ns)


def _name(names: object) -> str:
    """Return the first of several names, which Imagenette's classes have."""
    return str(names[0] if isinstance(names, tuple) else names)
