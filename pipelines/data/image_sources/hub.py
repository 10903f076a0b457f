"""Import a data set of the Hugging Face hub from its Parquet files with columns of images and labels."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from numpy.typing import NDArray

from pipelines.data.hub_copy import (
    Repository,
    check_file,
    download_files,
    is_whole,
    listed_digest,
    load_listing,
)
from pipelines.data.image_sources.files import read_ahead
from pipelines.data.image_sources.labels import (
    TRAIN_NAMES,
    VAL_FRACTION,
    VALIDATION_NAMES,
    WHOLE,
    fraction_note,
    validation_part,
)
from pipelines.data.images.decode import damage, image_suffix
from pipelines.data.images.importing import Contents, require_every_class
from pipelines.data.images.index import ImageClass
from pipelines.data.images.manifest import SOURCE, Layout
from pipelines.data.images.parquet_images import (
    IMAGES_AT_ONCE,
    batches,
    class_names,
    features,
    is_image_column,
    opened_table,
)
from pipelines.data.images.pixels import numbered_classes
from pipelines.data.images.streams import SourceReader, StreamedImage, import_streams
from pipelines.data.progress import Progress
from pipelines.data.retries import Notify
from pipelines.errors import AsgoError, UsageError

PREFIX = "hub:"
_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?")
_SPLIT_NAMES = (*TRAIN_NAMES, *(name for names in VALIDATION_NAMES for name in names))
_FILE = re.compile(rf"(?:.*[-_.])?({'|'.join(_SPLIT_NAMES)})[-_.].*", re.IGNORECASE)
_NUMBER = re.compile(r".*-(\d{5})-of-(\d{5})[-.].*")
_LABELS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Choice:
    """How to read a data set: its subset, its columns, the fraction for validation, and whether to skip bad images.

    None stands for the only one, or for the default fraction.
    """

    image_column: str | None = None
    label_column: str | None = None
    val_fraction: float | None = None
    skip_bad: bool = False


@dataclass(frozen=True)
class _Part:
    """A file, the number of its first row, the label of each row, and which rows to use."""

    path: Path
    first: int
    labels: NDArray[np.int64]
    used: NDArray[np.bool_]

    def __str__(self) -> str:
        return str(self.path)


class HubImporter:
    """Imports Parquet files of the hub in `root`/OWNER/NAME; see `ImageImporter`."""

    command = "images"

    def __init__(self, name: str, root: Path, choice: Choice, notify: Notify) -> None:
        """`name` is OWNER/NAME or OWNER/NAME:SUBSET. Raises `UsageError` for another one."""
        match = _NAME.fullmatch(name)
        if match is None:
            raise UsageError(f"{PREFIX}{name}: should be {PREFIX}OWNER/NAME, as in {PREFIX}uoft-cs/cifar10")
        self.dataset, self._subset = match[1], match[2]
        root = root.resolve()
        self.folder = root / self.dataset
        self.options = {SOURCE: f"{PREFIX}{name}", "root": str(root), **_as_options(choice)}
        self._choice = choice
        self._notify = notify
        self._image_column = ""
        self._classes: tuple[ImageClass, ...] = ()
        self._parts: dict[str, list[_Part]] = {}
        self._bad: dict[tuple[Path, int], str] = {}
        self._good: dict[Path, NDArray[np.bool_]] = {}

    @property
    def revision(self) -> str | None:
        listing = load_listing(self.folder)
        return None if listing is None else listing.revision

    def download(self, progress: Progress, notify: Notify) -> list[str]:
        """Download missing files, or resume that; return the names of those that are verified.

        Raises as `download_files` does, and `AsgoError` for a data set without usable files.
        """
        listing = load_listing(self.folder)
        if listing is None or self._subset or not is_whole(self.folder):
            repository = Repository(self.dataset, None, lambda paths: [*chain(*self._choose(paths).values())])
            download_files(repository, self.folder, progress=progress, notify=notify)
            listing = load_listing(self.folder)
        return [] if listing is None else [file.path for file in listing.files]

    def find(self, report: Progress) -> list[Path]:
        files = {split: [self.folder / path for path in paths] for split, paths in self._choose(self._there()).items()}
        paths = [*chain(*files.values())]
        label_column = self._require_columns(paths)
        values: dict[Path, list[Any]] = {}
        for number, path in enumerate(paths):
            report("reading the labels", number, len(paths))
            values[path] = list(_read_labels(path, label_column))
        self._good = {path: np.zeros(len(each), dtype=bool) for path, each in values.items()}
        names, numbers = _classes(paths, label_column, values)
        self._classes = numbered_classes(names)
        self._parts = {split: _parts(paths, numbers) for split, paths in files.items()}
        if WHOLE in self._parts:
            self._parts = self._split(self._parts[WHOLE])
        elif self._choice.val_fraction is not None:
            raise UsageError(f"--val-fraction: {PREFIX}{self.dataset} has validation images; omit it")
        self._require_every_class({split: _used_labels(parts) for split, parts in self._parts.items()})
        return paths

    def expected(self, path: Path) -> str | None:
        return listed_digest(self.folder, path)

    def check(self, path: Path, report: Progress) -> str:
        return check_file(self.folder, path, report)

    def make(self, out: Path, layout: Layout, workers: int, report: Progress) -> Contents:
        reader = SourceReader(self._read, lambda part: int(part.used.sum()), lambda part: part.path.stat().st_size)
        contents = import_streams(self._parts, reader, self._classes, out, layout, workers, report)
        if self._bad:
            more = f" (and {len(self._bad) - 1:,} more)" if len(self._bad) > 1 else ""
            self._notify(f"{self._bad[min(self._bad)]}{more}: skipped")
            self._require_every_class({split: index.labels for split, index in contents.indices.items()})
        return contents

    def _there(self) -> list[str]:
        """Return the paths of the files that should be there: those of the last download, or all Parquet files."""
        listing = load_listing(self.folder)
        if listing is None:
            found = [str(path.relative_to(self.folder)) for path in self.folder.rglob("*.parquet") if path.is_file()]
            if not found:
                raise UsageError(
                    f"{self.folder}: no Parquet files; put those of {PREFIX}{self.dataset} there, pass the folder "
                    "that holds OWNER/NAME with --root, or get them with --download"
                )
            return [path for path in found if not path.startswith(".")]
        for file in listing.files:
            if not (self.folder / file.path).is_file():
                raise UsageError(f"{self.folder / file.path}: missing; get it with --download")
        return [file.path for file in listing.files]

    def _choose(self, paths: Sequence[str]) -> dict[str, list[str]]:
        """Return the paths by split, or under `WHOLE`. Raises `AsgoError` if a subset must be chosen."""
        subsets: dict[str, dict[str, list[str]]] = {}
        for path in sorted(paths):
            if path.endswith(".parquet"):
                subset, split = _subset_and_split(path)
                subsets.setdefault(subset, {}).setdefault(split, []).append(path)
        if not subsets:
            raise AsgoError(f"{PREFIX}{self.dataset}: has no Parquet files; import its archive or folder instead")
        if (self._subset is None and len(subsets) > 1) or self._subset not in (None, *subsets):
            example = f"{PREFIX}{self.dataset}:{min(subsets)}"
            raise UsageError(
                f"{PREFIX}{self.dataset}: has the subsets {', '.join(sorted(subsets))}; choose one: {example}"
            )
        splits = subsets[self._subset or next(iter(subsets))]
        train = next((splits[name] for name in TRAIN_NAMES if name in splits), splits.get(WHOLE))
        validation = next((splits[name] for names in VALIDATION_NAMES for name in names if name in splits), None)
        if train is None:
            raise AsgoError(f"{PREFIX}{self.dataset}: no training files; it has those of {', '.join(sorted(splits))}")
        chosen = {WHOLE: train} if validation is None else {"train": train, "val": validation}
        for files in chosen.values():
            _require_complete(files)
        return chosen

    def _require_columns(self, paths: Sequence[Path]) -> str:
        """Find the columns in the first file, require them in all; return that of the labels."""
        with opened_table(paths[0]) as table:
            schema = table.schema_arrow
        where = f"{paths[0]}: its columns are {', '.join(schema.names)}"
        images = [name for name in schema.names if is_image_column(schema, name)]
        self._image_column = _one(images, self._choice.image_column, where, "images", "--image-column")
        kinds = features(schema)
        labels = [name for name in schema.names if kinds.get(name, {}).get("_type") == "ClassLabel"]
        labels = labels or [name for name in schema.names if name == "label"]
        if self._choice.label_column in schema.names:
            labels = [str(self._choice.label_column)]
        label_column = _one(labels, self._choice.label_column, where, "labels", "--label-column")
        for path in paths:
            with opened_table(path) as table:
                if (
                    not is_image_column(table.schema_arrow, self._image_column)
                    or label_column not in table.schema_arrow.names
                ):
                    raise AsgoError(
                        f"{path}: has not the columns {self._image_column} and {label_column} of {paths[0].name}"
                    )
        return label_column

    def _split(self, parts: Sequence[_Part]) -> dict[str, list[_Part]]:
        labels = np.concatenate([part.labels for part in parts])
        for_validation = np.zeros(len(labels), dtype=bool)
        for label, each in enumerate(self._classes):
            rows = np.flatnonzero(labels == label)
            names = [f"{row:07d}" for row in rows.tolist()]
            chosen = validation_part(each.id, names, self._choice.val_fraction or VAL_FRACTION)
            for_validation[[int(name) for name in chosen]] = True
        note = fraction_note(int(for_validation.sum()), len(labels), self._choice.val_fraction)
        if note is not None:
            self._notify(note)
        splits: dict[str, list[_Part]] = {"train": [], "val": []}
        for part in parts:
            mine = for_validation[part.first : part.first + len(part.labels)]
            splits["train"].append(_Part(part.path, part.first, part.labels, ~mine))
            splits["val"].append(_Part(part.path, part.first, part.labels, mine))
        return splits

    def _require_every_class(self, labels: Mapping[str, NDArray[np.int64]]) -> None:
        try:
            require_every_class(self._classes, labels)
        except AsgoError as error:
            raise AsgoError(f"{self.folder}: {error}") from None

    def _read(self, part: _Part) -> Iterator[StreamedImage]:
        def check(numbered: tuple[int, bytes]) -> tuple[int, bytes, str | None]:
            return *numbered, self._problem(part.path, *numbered)

        for row, content, problem in read_ahead(check, self._rows(part), os.cpu_count() or 1):
            if problem is None:
                name = f"{part.first + row:07d}{image_suffix(content[:16])}"
                yield StreamedImage(self._classes[part.labels[row]].id, name, content)
            elif self._choice.skip_bad:
                self._bad[part.path, row] = problem
            else:
                raise AsgoError(f"{problem}; pass --skip-bad to leave such rows out")

    def _rows(self, part: _Part) -> Iterator[tuple[int, bytes]]:
        """Yield the number and the image of each row to use."""
        row = 0
        with opened_table(part.path) as table:
            for batch in batches(part.path, table, IMAGES_AT_ONCE, f"{self._image_column}.bytes"):
                for image in batch.column(0).to_pylist():
                    if part.used[row]:
                        yield row, (image or {}).get("bytes") or b""
                    row += 1

    def _problem(self, path: Path, row: int, content: bytes) -> str | None:
        """Return why a row holds no good image, or None. Decodes each image once."""
        where = f"{path}: row {row:,}"
        if image_suffix(content[:16]) is None:
            return f"{where}: {'not an image' if content else 'empty'}"
        if self._good[path][row]:
            return None
        problem = self._bad.get((path, row)) or damage(content, where)
        self._good[path][row] = problem is None
        return problem


def _as_options(choice: Choice) -> dict[str, str]:
    given = {"image-column": choice.image_column, "label-column": choice.label_column}
    options = {name: value for name, value in given.items() if value is not None}
    if choice.val_fraction is not None:
        options["val-fraction"] = f"{choice.val_fraction:g}"
    return options | ({"skip-bad": ""} if choice.skip_bad else {})


def _subset_and_split(path: str) -> tuple[str, str]:
    """Return the folder's name and the split of a file such as `plain_text/train-00000-of-00001.parquet`."""
    *folders, file = path.split("/")
    match = _FILE.fullmatch(file)
    if match is None and folders and folders[-1].lower() in _SPLIT_NAMES:
        *folders, split = folders
    else:
        split = match[1] if match else WHOLE
    return (folders[-1] if folders else "default"), split.lower()


def _require_complete(files: Sequence[str]) -> None:
    numbered = [match for file in files if (match := _NUMBER.fullmatch(file))]
    expected = max((int(match[2]) for match in numbered), default=0)
    there = {int(match[1]) for match in numbered}
    for number in range(expected):
        if number not in there:
            raise AsgoError(f"{files[0]}: of its {expected:,} files, number {number:05d} is missing; use --download")


def _one(found: Sequence[str], given: str | None, where: str, what: str, option: str) -> str:
    if given is not None:
        if given not in found:
            raise UsageError(f"{option} {given}: not a column of {what}; {where}")
        return given
    if len(found) != 1:
        problem = f"{len(found)} of them hold" if found else "none of them holds"
        raise UsageError(f"{where}, and {problem} {what}; choose one with {option}")
    return found[0]


def _read_labels(path: Path, column: str) -> Iterator[Any]:
    with opened_table(path) as table:
        kind = table.schema_arrow.field(column).type
        if pyarrow.types.is_dictionary(kind):
            kind = kind.value_type
        if not (pyarrow.types.is_integer(kind) or pyarrow.types.is_string(kind) or pyarrow.types.is_boolean(kind)):
            raise UsageError(f"{path}: the column {column} holds {kind}, not labels; choose one with --label-column")
        for batch in batches(path, table, _LABELS_AT_ONCE, column):
            yield from batch.column(0).to_pylist()


def _classes(
    paths: Sequence[Path], column: str, values: Mapping[Path, Sequence[Any]]
) -> tuple[list[str], dict[Path, NDArray[np.int64]]]:
    """Return the names of the classes, and the labels of each file: from the file's note, or all values, sorted."""
    with opened_table(paths[0]) as table:
        noted = class_names(table.schema_arrow, column)
    for path in paths:
        if None in values[path]:
            raise AsgoError(f"{path}: row {values[path].index(None):,} has no label")
    known = list(range(len(noted))) if noted else sorted({value for each in values.values() for value in each})
    places = {value: place for place, value in enumerate(known)}
    numbers = {}
    for path in paths:
        unknown = next((value for value in values[path] if value not in places), None)
        if unknown is not None:
            raise AsgoError(f"{path}: label {unknown} is not one of its {len(known):,} classes (unlabelled images?)")
        numbers[path] = np.array([places[value] for value in values[path]], dtype=np.int64)
    return noted or [str(value) for value in known], numbers


def _parts(paths: Sequence[Path], labels: Mapping[Path, NDArray[np.int64]]) -> list[_Part]:
    parts, first = [], 0
    for path in paths:
        parts.append(_Part(path, first, labels[path], np.ones(len(labels[path]), dtype=bool)))
        first += len(labels[path])
    return parts


def _used_labels(parts: Sequence[_Part]) -> NDArray[np.int64]:
    return np.concatenate([part.labels[part.used] for part in parts])
