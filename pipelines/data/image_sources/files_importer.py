"""Import labelled images from a folder or an archive."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pipelines.data.image_sources.archives import open_archive
from pipelines.data.image_sources.files import MAX_IMAGE_BYTES, File, FileSource, Folder, LocalFiles, read_ahead
from pipelines.data.image_sources.labels import (
    VAL_FRACTION,
    WHOLE,
    Found,
    Images,
    find_images,
    first_of,
    fraction_note,
    require_classes,
    split_images,
    with_names,
)
from pipelines.data.images.decode import damage, image_suffix
from pipelines.data.images.importing import Contents
from pipelines.data.images.index import SPLITS, ImageClass, Index, build_index, index_file, write_index
from pipelines.data.images.manifest import SOURCE, Layout
from pipelines.data.images.pixels import common_shape
from pipelines.data.images.streams import SourceReader, StreamedImage, all_images, import_streams
from pipelines.data.progress import Progress, digest_of
from pipelines.data.retries import Notify
from pipelines.errors import AsgoError, UsageError

_PART_BYTES = 64 << 20
_KAGGLE_FOLDERS = ("CLS-LOC", "Data", "ILSVRC")
_THREADS = 8
_REPORT_EVERY = 16


@dataclass
class _Part:
    """Images that are imported together, as (class id, name, file), and the name of the source."""

    source: str
    images: list[tuple[str, str, File]] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(file.size for *_, file in self.images)

    def __str__(self) -> str:
        return self.source


class FilesImporter:
    """Imports the images of a folder or archive at `path`; see `ImageImporter`.

    `val_fraction` of each class are validation images (default: `VAL_FRACTION`), where the source has no split.
    """

    command = "images"
    revision = None

    def __init__(
        self, path: Path, notify: Notify, *, val_fraction: float | None = None, skip_bad: bool = False
    ) -> None:
        self._path = path.resolve()
        self.folder = self._path if self._path.is_dir() else self._path.parent
        self.dataset = self._path.name.partition(".")[0] or str(self._path)
        self.options = {SOURCE: str(self._path)}
        if val_fraction is not None:
            self.options["val-fraction"] = f"{val_fraction:g}"
        if skip_bad:
            self.options["skip-bad"] = ""
        self._notify = notify
        self._val_fraction = val_fraction
        self._skip_bad = skip_bad
        self._source: FileSource
        self._digest = ""
        self._images: Mapping[str, Images] = {}
        self._classes: tuple[ImageClass, ...] = ()

    def find(self, report: Progress) -> list[Path]:
        found = self._list(report)
        for path in found.unused:
            self._notify(f"{self._source.where(path)}: not used")
        images = self._good(found, report)
        class_ids = require_classes(self._source, images)
        if WHOLE in images:
            images = split_images(self._source, images[WHOLE], self._val_fraction or VAL_FRACTION)
            train, validation = (sum(map(len, images[split].values())) for split in SPLITS)
            note = fraction_note(validation, train + validation, self._val_fraction)
            if note is not None:
                self._notify(note)
        elif self._val_fraction is not None:
            raise UsageError(f"--val-fraction: {self._path} has validation images, so it is not used; omit it")
        self._images, self._classes = images, with_names(class_ids, found.names)
        digest = hashlib.sha256()
        for *_, file in self._listed():
            digest.update(f"{file.path}\0{file.size}\0{file.modified_ns}\n".encode())
        self._digest = f"sha256:{digest.hexdigest()}"
        return [self._path]

    def expected(self, path: Path) -> str | None:
        return self._digest if path.is_dir() else None  # of a folder, that of its names, sizes and times

    def check(self, path: Path, report: Progress) -> str:
        return self.expected(path) or f"sha256:{digest_of(path, 'sha256', partial(report, f'checking {path.name}'))}"

    def make(self, out: Path, layout: Layout, workers: int, report: Progress) -> Contents:
        parts = {split: list(self._parts(split)) for split in SPLITS}
        reader = SourceReader(self._read, lambda part: len(part.images), lambda part: part.bytes)
        offsets = {split: self._offsets(split) for split in SPLITS}
        can_stay = layout != "extracted" and None not in offsets.values()
        if can_stay and (layout == "packed" or common_shape(all_images(parts, reader, report)) is None):
            return self._in_place(out, offsets)
        return import_streams(parts, reader, self._classes, out, layout, workers, report)

    def _list(self, report: Progress) -> Found:
        """Open the source and find its images."""
        beside: list[Folder] = []
        if self._path.is_dir():
            self._source = LocalFiles(self._path, _THREADS)
            if self._path.name in _KAGGLE_FOLDERS:
                beside = [LocalFiles(parent).top for parent in list(self._path.parents)[:3]]
        else:
            self._source = open_archive(self._path, report)
        return find_images(self._source, report, beside)

    def _good(self, found: Found, report: Progress) -> dict[str, Images]:
        """Return the images that can be decoded.

        Raises `AsgoError` for other files, unless they are to be skipped, and for an image that is too large.
        """
        bad = [self._no_image(file) for file in found.others]
        for problems in (self._by_their_heads, self._by_decoding):
            listed = [
                (names, name) for classes in found.images.values() for names in classes.values() for name in names
            ]
            for number, problem in problems([names[name] for names, name in listed], report):
                names, name = listed[number]
                del names[name]
                bad.append(problem)
            if bad and not self._skip_bad:
                raise AsgoError(f"{first_of(bad)}; remove such files, or pass --skip-bad")
        if bad:
            self._notify(f"{first_of(bad)}: skipped")
        return found.images

    def _no_image(self, file: File) -> str:
        return f"{self._source.where(file.path)}: {'not an image' if file.size else 'empty'}"

    def _by_their_heads(self, files: Sequence[File], report: Progress) -> Iterator[tuple[int, str]]:
        """Yield the number of each file that does not begin like an image, and what is wrong."""
        for number, head in enumerate(self._source.heads(files)):
            file = files[number]
            if image_suffix(head) is None:
                yield number, self._no_image(file)
            elif file.size > MAX_IMAGE_BYTES:
                where = self._source.where(file.path)
                raise AsgoError(f"{where}: {file.size:,} bytes, more than the limit of {MAX_IMAGE_BYTES:,}")
            if number % _REPORT_EVERY == 0:
                report("reading the beginnings of the images", number, len(files))

    def _by_decoding(self, files: Sequence[File], report: Progress) -> Iterator[tuple[int, str]]:
        """Yield the number of each image that cannot be decoded, and what is wrong. Decodes in threads."""

        def check(numbered: tuple[int, bytes]) -> tuple[int, str | None]:
            number, content = numbered
            return number, damage(content, self._source.where(files[number].path))

        checked = read_ahead(check, self._source.contents(files), os.cpu_count() or 1)
        for done, (number, problem) in enumerate(checked):
            if problem is not None:
                yield number, problem
            if done % _REPORT_EVERY == 0:
                report("checking the images", done, len(files))

    def _listed(self, *splits: str) -> Iterator[tuple[str, str, File]]:
        """Yield class id, name and file of the images, sorted by split, class and name."""
        for split in splits or SPLITS:
            for class_id, files in sorted(self._images[split].items()):
                for name, file in sorted(files.items()):
                    yield class_id, name, file

    def _parts(self, split: str) -> Iterator[_Part]:
        """Divide a split into parts of some megabytes, so that little is repeated after a kill."""
        part = _Part(str(self._path))
        size = 0
        for image in self._listed(split):
            if size > _PART_BYTES and not self._source.is_stream:
                yield part
                part, size = _Part(str(self._path)), 0
            part.images.append(image)
            size += image[2].size
        yield part

    def _read(self, part: _Part) -> Iterator[StreamedImage]:
        for number, content in self._source.contents([file for *_, file in part.images]):
            class_id, name, _ = part.images[number]
            yield StreamedImage(class_id, name, content)

    def _offsets(self, split: str) -> list[int] | None:
        """Return the offset of each image in the archive; None if one of them cannot be read in place."""
        offsets = []
        for *_, file in self._listed(split):
            offset = self._source.offset(file)
            if offset is None:
                return None
            offsets.append(offset)
        return offsets

    def _in_place(self, out: Path, offsets: Mapping[str, Sequence[int] | None]) -> Contents:
        labels = {each.id: label for label, each in enumerate(self._classes)}
        indices: dict[str, Index] = {}
        for split in SPLITS:
            listed = list(self._listed(split))
            index = build_index(
                (labels[class_id] for class_id, *_ in listed),
                [name for _, name, _ in listed],
                [file.size for *_, file in listed],
                offsets[split],
            )
            indices[split] = index if split == "train" else index.take(index.names.argsort(kind="stable"))
            write_index(out / index_file(split), indices[split], list(labels))
        return Contents(self._classes, indices, containers=dict.fromkeys(SPLITS, self._path.name))
