"""ImageNet from its three archives: extracted, or indexed to be read in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipelines.data.imagenet.archives import ARCHIVES, Archive, Progress, check_archive, expected_archives
from pipelines.data.imagenet.extract import extract_images
from pipelines.data.imagenet.index import (
    SPLITS,
    Index,
    build_train_index,
    build_validation_index,
    index_file,
    read_index,
    write_index,
)
from pipelines.data.imagenet.labels import Labels, read_devkit
from pipelines.data.imagenet.manifest import Layout, Origin
from pipelines.data.imagenet.members import open_tar
from pipelines.data.imagenet.origin import Contents, on_disk, require_room
from pipelines.errors import UsageError


class ArchiveFiles:
    """The archives in a folder; see `OriginFiles`."""

    origin: Origin = "archives"
    revision = None

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._expected: Mapping[str, Archive] = {}

    def find(self) -> list[Path]:
        missing = [archive.file for archive in ARCHIVES.values() if not (self.folder / archive.file).is_file()]
        if missing:
            raise UsageError(
                f"{self.folder}: {_other_layout(self.folder)}no {', no '.join(missing)}; "
                "name the folder of the archives with --archives, or get them with --download"
            )
        self._expected = {archive.file: archive for archive in expected_archives(self.folder).values()}
        return [self.folder / file for file in self._expected]

    def expected(self, path: Path) -> str:
        return f"md5:{self._expected[path.name].md5}"

    def check(self, path: Path, report: Progress) -> str:
        check_archive(path, self._expected[path.name], report)
        return self.expected(path)

    def make(self, out: Path, layout: Layout, workers: int, report: Progress) -> Contents:
        labels = read_devkit(self._path("devkit"))
        wnids = [each.wnid for each in labels.classes]
        indices = {split: self._index(out, split, labels, wnids, report) for split in SPLITS}
        if layout == "extracted":
            _require_room(out, indices)
            for split, index in indices.items():
                extract_images(self._path(split), index, out / split, wnids, workers, report)
        return Contents(labels.classes, indices)

    def _index(self, out: Path, split: str, labels: Labels, wnids: Sequence[str], report: Progress) -> Index:
        path = out / index_file(split)
        if not path.exists():
            build = build_train_index if split == "train" else build_validation_index
            with open_tar(self._path(split)) as tar:
                write_index(path, build(tar, labels, report), wnids)
        return read_index(path, wnids)

    def _path(self, key: str) -> Path:
        return self.folder / ARCHIVES[key].file


def _other_layout(folder: Path) -> str:
    """What lies in the folder in the place of archives, if it is known, in words to begin with."""
    if (folder / "ILSVRC").is_dir() or (folder / "LOC_synset_mapping.txt").is_file():
        return "holds ImageNet as Kaggle gives it, which cannot be taken; the archives of image-net.org are wanted: "
    if (folder / "train").is_dir():
        return "holds a folder of image files, which cannot be taken; the archives of image-net.org are wanted: "
    return ""


def _require_room(out: Path, indices: Mapping[str, Index]) -> None:
    if any((out / split).exists() for split in indices):  # of an earlier call, and not counted
        return
    needed = sum(on_disk(int(index.sizes.sum()), len(index)) for index in indices.values())
    require_room(out, needed, "leave them in the archives with --no-extract")
