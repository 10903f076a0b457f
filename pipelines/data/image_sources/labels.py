"""Find the classes and the splits of labelled images in a tree of folders.

Known are `train` and `val` with a folder for each class, folders of classes alone, and the layouts of Kaggle's ImageNet
and of Tiny ImageNet.
"""

from __future__ import annotations

import csv
import hashlib
import io
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from pipelines.data.image_sources.files import File, FileSource, Folder
from pipelines.data.images.decode import IMAGE_SUFFIXES
from pipelines.data.images.index import ImageClass
from pipelines.data.progress import Progress
from pipelines.errors import AsgoError, UsageError

Images = dict[str, dict[str, File]]
"""Files by class id and name."""

WHOLE = "all"
"""The key of images that are not split yet."""
TRAIN_NAMES = ("train", "training")
VALIDATION_NAMES = (("val",), ("valid", "validation"), ("test", "testing"))
"""Names of folders of validation images, the first ones preferred."""
VAL_FRACTION = 0.1
_FACTOR = 2
_SPLITS = (*TRAIN_NAMES, *(name for names in VALIDATION_NAMES for name in names))
_DEEPEST = 8
_LONGEST_NAME = 255
_LARGEST_TABLE = 64 << 20
_LABELS, _NAMES = "LOC_val_solution.csv", "LOC_synset_mapping.txt"
_TINY_LABELS, _TINY_NAMES = "val_annotations.txt", "words.txt"
EXPECTED = "expected are train/CLASS/IMAGE and val/CLASS/IMAGE, or CLASS/IMAGE"


@dataclass(frozen=True)
class Found:
    """The images by split, or under `WHOLE`; the names of classes that have one; other files and folders beside them.

    `others` are files in class folders whose names are not those of images, `unused` the paths of folders.
    """

    images: dict[str, Images]
    names: dict[str, str] = field(default_factory=dict)
    others: list[File] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


def find_images(source: FileSource, report: Progress, beside: Sequence[Folder] = ()) -> Found:
    """Find the images of a source by the names of its files and folders.

    `beside` are other folders that may hold Kaggle's tables. Raises `UsageError` for folders that are no data set.
    """
    return _Finder(source, report, beside).find()


class _Finder:
    def __init__(self, source: FileSource, report: Progress, beside: Sequence[Folder]) -> None:
        self._source = source
        self._report = report
        self._found = Found({})
        self._path = _path_to_data(source.top)
        self._tables = [*reversed(self._path), *beside]

    def find(self) -> Found:
        base = self._path[-1]
        splits = {name.casefold(): each for name, each in base.folders.items() if name.casefold() in _SPLITS}
        train = next((splits[name] for name in TRAIN_NAMES if name in splits), None)
        validation = next((splits[name] for names in VALIDATION_NAMES for name in names if name in splits), None)
        if train is not None and (train.folders or len(splits) == len(base.folders)):
            used = [each for each in (train, validation) if each is not None]
            self._found.unused.extend(each.path for each in base.folders.values() if each not in used)
            self._found.images["train" if validation else WHOLE] = self._classes(train)
            if validation is not None:
                self._found.images["val"] = self._validation(validation)
        else:
            if validation is not None:
                self._refuse(validation.path, "a folder of validation images, without one of training images beside it")
            self._found.images[WHOLE] = self._classes(base)
        self._found.names.update(self._names())
        return self._found

    def _classes(self, folder: Folder) -> Images:
        """Return the images of a folder of class folders."""
        loose = [file for name, file in folder.files.items() if is_image_name(name)]
        if loose:
            self._refuse(loose[0].path, f"an image that is not in a folder of its class; {EXPECTED}")
        if not folder.folders:
            self._refuse(folder.path, f"no folders of classes; {EXPECTED}")
        images = {}
        for number, (name, each) in enumerate(folder.folders.items()):
            self._report(f"listing {folder.path or 'the images'}", number, len(folder.folders))
            images[name] = self._images(each)
        return images

    def _images(self, folder: Folder) -> dict[str, File]:
        """Return the images of a class folder."""
        if list(folder.folders) == ["images"] and not any(map(is_image_name, folder.files)):
            folder = folder.folders["images"]  # as in Tiny ImageNet, beside a table of boxes
        if folder.folders:
            inner = next(iter(folder.folders.values()))
            self._refuse(inner.path, f"a folder in a folder of a class; {EXPECTED}")
        images = {name: file for name, file in folder.files.items() if is_image_name(name)}
        self._found.others.extend(file for name, file in folder.files.items() if name not in images)
        return images

    def _validation(self, folder: Folder) -> Images:
        """Return validation images: in class folders, or in one folder with a table of labels."""
        flat = folder.folders.get("images", folder) if _TINY_LABELS in folder.files else folder
        images = {name: file for name, file in flat.files.items() if is_image_name(name)}
        if not images:
            return self._classes(folder)
        labels = dict(self._labels(folder))
        by_class: Images = {}
        for name, file in images.items():
            class_id = labels.get(name) or labels.get(name.rpartition(".")[0])
            if class_id is None:
                self._refuse(file.path, f"not in a folder of its class, and without a label; {EXPECTED}")
            by_class.setdefault(class_id, {})[name] = file
        return by_class

    def _labels(self, folder: Folder) -> Iterator[tuple[str, str]]:
        """Yield names of validation images, Kaggle's without their endings, and their classes."""
        if (tiny := folder.files.get(_TINY_LABELS)) is not None:
            for line in self._lines(tiny):
                name, class_id, *_ = *line.split("\t"), ""
                yield name, class_id
        elif (kaggle := self._table(_LABELS)) is not None:
            for row in csv.DictReader(io.StringIO("\n".join(self._lines(kaggle)))):
                yield row.get("ImageId") or "", (row.get("PredictionString") or "").partition(" ")[0]

    def _names(self) -> Iterator[tuple[str, str]]:
        """Yield class ids and names. Of several names of a class, the first one is used."""
        if (kaggle := self._table(_NAMES)) is not None:
            for line in self._lines(kaggle):
                class_id, _, names = line.partition(" ")
                yield class_id, names.partition(",")[0].strip()
        elif (tiny := self._path[-1].files.get(_TINY_NAMES)) is not None:
            for line in self._lines(tiny):
                class_id, _, names = line.partition("\t")
                yield class_id, names.partition(",")[0].strip()

    def _table(self, name: str) -> File | None:
        return next((folder.files[name] for folder in self._tables if name in folder.files), None)

    def _lines(self, table: File) -> list[str]:
        if table.size > _LARGEST_TABLE:
            self._refuse(table.path, "too large for a table of labels")
        ((_, content),) = self._source.contents([table])
        return content.decode("utf-8", errors="replace").splitlines()

    def _refuse(self, path: str, problem: str) -> NoReturn:
        raise UsageError(f"{self._source.where(path)}: {problem}")


def is_image_name(name: str) -> bool:
    """Whether a file name has the ending of an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def _path_to_data(top: Folder) -> list[Folder]:
    """Return the folders from the source's down to the one of the data.

    Passes through folders with nothing but one folder of folders, and through `ILSVRC/Data/CLS-LOC` of Kaggle.
    """
    path = [top]
    while len(path) < _DEEPEST:
        folders = path[-1].folders
        only = next(iter(folders.values())) if len(folders) == 1 else None
        if "CLS-LOC" in (data := folders.get("Data", path[-1])).folders:
            path += [data] * (data is not path[-1]) + [data.folders["CLS-LOC"]]
        elif "ILSVRC" in folders:
            path.append(folders["ILSVRC"])
        elif only is not None and only.folders and not any(map(is_image_name, path[-1].files)):
            if list(only.folders) == ["images"] and only.folders["images"].files:
                return path
            path.append(only)
        else:
            return path
    return path


def require_classes(source: FileSource, images: Mapping[str, Images]) -> tuple[str, ...]:
    """Return the class ids, sorted.

    Raises `AsgoError` for a single class, names that differ in case only, names that are too long or not printable,
    and a class without an image in a split.
    """
    class_ids = sorted({class_id for classes in images.values() for class_id in classes})
    _require_names(source, class_ids, images)
    for split, classes in images.items():
        empty = [class_id for class_id in class_ids if not classes.get(class_id)]
        if empty:
            more = f" (and {len(empty) - 1:,} classes more)" if len(empty) > 1 else ""
            place = "" if split == WHOLE else f" in {split}"
            raise AsgoError(f"{source.where('')}: class {empty[0]!r} has no images{place}{more}")
    if len(class_ids) < 2:
        raise AsgoError(f"{source.where('')}: only the class {class_ids[0]!r}; a classifier needs two; {EXPECTED}")
    return tuple(class_ids)


def _require_names(source: FileSource, class_ids: Iterable[str], images: Mapping[str, Images]) -> None:
    seen: dict[str, str] = {}
    for class_id in class_ids:
        other = seen.setdefault(unicodedata.normalize("NFC", class_id).casefold(), class_id)
        if other != class_id:
            raise AsgoError(f"{source.where('')}: classes {other!r} and {class_id!r} differ in case only; rename one")
    for classes in images.values():
        for class_id, files in classes.items():
            for name in (class_id, *files):
                if not name.isprintable() or len(name.encode()) > _LONGEST_NAME:
                    raise AsgoError(
                        f"{source.where('')}: the name {name[:80]!r} is too long or not printable; rename it"
                    )


def split_images(source: FileSource, images: Images, fraction: float) -> dict[str, Images]:
    """Split every class with `validation_part`. Raises `AsgoError` for a class with a single image."""
    splits: dict[str, Images] = {"train": {}, "val": {}}
    for class_id, files in images.items():
        if len(files) < 2:
            raise AsgoError(f"{source.where('')}: class {class_id!r} has one image, too few to split; add images")
        chosen = validation_part(class_id, files, fraction)
        splits["val"][class_id] = {name: file for name, file in files.items() if name in chosen}
        splits["train"][class_id] = {name: file for name, file in files.items() if name not in chosen}
    return splits


def validation_part(class_id: str, names: Collection[str], fraction: float) -> set[str]:
    """Return the names of a class's validation images: `fraction` of them, at least one, but not all.

    Those with the smallest SHA-256 of CLASS/NAME are taken, so the split depends on the names only.
    """
    order = sorted(names, key=lambda name: hashlib.sha256(f"{class_id}/{name}".encode()).digest())
    return set(order[: min(max(1, round(fraction * len(order))), len(order) - 1)])


def fraction_note(validation: int, total: int, asked: float | None) -> str | None:
    """Return a line for the user if `validation` of `total` images differ from the fraction asked by a factor of 2."""
    if asked is None or not total:
        return None
    real = validation / total
    factors = (real / asked, (1 - real) / (1 - asked))
    if all(1 / _FACTOR < factor < _FACTOR for factor in factors):
        return None
    why = "each class has at least one image for training and one for validation"
    return f"--val-fraction {asked:g}: {validation:,} of {total:,} images are for validation, {real:.2g}; {why}"


def first_of(problems: Sequence[str]) -> str:
    """Return the first of the files with a problem, and how many more there are."""
    more = len(problems) - 1
    return problems[0] + (f" (and {more:,} file{'s' * (more > 1)} more)" if more else "")


def with_names(class_ids: Sequence[str], names: Mapping[str, str]) -> tuple[ImageClass, ...]:
    """Return the classes; a class without a name is called by its id."""
    return tuple(ImageClass(class_id, names.get(class_id) or class_id) for class_id in class_ids)
