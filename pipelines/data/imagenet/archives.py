"""Extract the three archives of ILSVRC2012, or index them to read images in place."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipelines import shell
from pipelines.data.imagenet.archive_index import build_train_index, build_validation_index
from pipelines.data.imagenet.devkit import Labels, read_devkit
from pipelines.data.images.extract import extract_images
from pipelines.data.images.importing import Contents, on_disk, require_room
from pipelines.data.images.index import SPLITS, Index, index_file, read_index, write_index
from pipelines.data.images.manifest import Layout
from pipelines.data.images.tar import open_tar
from pipelines.data.progress import Progress, digest_of
from pipelines.errors import AsgoError, UsageError


@dataclass(frozen=True)
class Archive:
    """An archive's file name, its length in bytes if known, and its hexadecimal MD5."""

    file: str
    bytes: int | None
    md5: str


ARCHIVES: Mapping[str, Archive] = {
    "train": Archive("ILSVRC2012_img_train.tar", 147_897_477_120, "1d675b47d978889d74fa0da5fadfb00e"),
    "val": Archive("ILSVRC2012_img_val.tar", 6_744_924_160, "29b22e2961454d5413ddabcf34fc5622"),
    "devkit": Archive("ILSVRC2012_devkit_t12.tar.gz", None, "fa75699e90414af021442c21a62c3abf"),
}
"""The official archives."""

MD5SUMS = "md5sums.txt"
"""File beside the archives, in the format of `md5sum`, with the digests of archives that are not the official ones."""

_MD5SUM_LINE = re.compile(r"([0-9a-fA-F]{32}) [ *](?:\./)?(.+)")


def parse_md5sums(text: str, origin: str) -> dict[str, Archive]:
    """Return the archives that an `md5sums.txt` describes, by the keys of `ARCHIVES`. Ignores lines of other files.

    Raises `AsgoError` with `origin` if a line is malformed or an archive is not listed.
    """
    digests = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        match = _MD5SUM_LINE.fullmatch(line.strip())
        if match is None:
            raise AsgoError(f"{origin}: line {number} is not in md5sum's format (a digest, two spaces, a file name)")
        digests[match[2]] = match[1].lower()
    for archive in ARCHIVES.values():
        if archive.file not in digests:
            raise AsgoError(f"{origin}: no line for {archive.file}")
    return {key: replace(each, bytes=None, md5=digests[each.file]) for key, each in ARCHIVES.items()}


def expected_archives(folder: Path) -> Mapping[str, Archive]:
    """Return the archives that `folder` must hold: those of its `md5sums.txt`, or else the official ones.

    Raises `AsgoError` if `md5sums.txt` cannot be read or is malformed.
    """
    path = folder / MD5SUMS
    try:
        return parse_md5sums(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        return ARCHIVES
    except (OSError, UnicodeDecodeError) as error:
        raise AsgoError(f"{path}: cannot be read ({error})") from None


def check_archive(path: Path, archive: Archive, progress: Progress) -> None:
    """Read all of `path`. Raises `AsgoError` unless it has the length and the MD5 of `archive`."""
    remedy = f"download it again, or list it in {path.parent / MD5SUMS} if it is another edition"
    try:
        size = path.stat().st_size
        if archive.bytes is not None and size != archive.bytes:
            raise AsgoError(f"{path}: {size:,} bytes long, not {archive.bytes:,}; {remedy}")
        md5 = digest_of(path, "md5", lambda done, total: progress(f"checking {archive.file}", done, total))
    except OSError as error:
        raise AsgoError(f"{path}: {error.strerror}") from None
    if md5 != archive.md5:
        raise AsgoError(f"{path}: its MD5 is {md5}, not {archive.md5}; {remedy}")


class ArchiveImporter:
    """Imports the archives in a folder; see `ImageImporter`."""

    dataset = "ImageNet"
    command = "imagenet"
    revision = None

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.options = {"source": "archives", "archives": str(self.folder)}
        self._expected: Mapping[str, Archive] = {}

    def find(self, report: Progress) -> list[Path]:
        missing = [archive.file for archive in ARCHIVES.values() if not (self.folder / archive.file).is_file()]
        if missing:
            raise UsageError(
                f"{self.folder}: no {', no '.join(missing)}; "
                + (_other_layout(self.folder) or "pass the folder of the archives with --archives, or --download them")
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
        wnids = [each.id for each in labels.classes]
        indices = {split: self._index(out, split, labels, wnids, report) for split in SPLITS}
        if layout == "packed":
            return Contents(labels.classes, indices, containers={split: ARCHIVES[split].file for split in SPLITS})
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
    """Return what to do with another known layout of ImageNet in the folder, or ""."""
    command = shell.command("asgo", "data", "images", folder, "--out", "data/imagenet")
    if (folder / "ILSVRC").is_dir() or (folder / "LOC_synset_mapping.txt").is_file():
        return f"it holds Kaggle's layout: import that with: {command}"
    if (folder / "train").is_dir():
        return f"it holds a folder of image files: import that with: {command}"
    return ""


def _require_room(out: Path, indices: Mapping[str, Index]) -> None:
    if any((out / split).exists() for split in indices):  # a resumed call: what it still needs is unknown
        return
    needed = sum(on_disk(int(index.sizes.sum()), len(index)) for index in indices.values())
    require_room(out, needed, "read them from the archives with --no-extract")
