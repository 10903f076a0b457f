"""Import data sets of torchvision from the files that torchvision downloads. Nothing is unpickled."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.data.download import Advice, Download
from pipelines.data.holding import held_folder
from pipelines.data.image_sources import pixel_files
from pipelines.data.image_sources.torchvision_files import FILE_SETS
from pipelines.data.images.importing import Contents
from pipelines.data.images.manifest import SOURCE, Layout
from pipelines.data.images.pixels import PixelSet, import_pixels, numbered_classes
from pipelines.data.progress import Progress, digest_of
from pipelines.data.retries import Notify, Retries
from pipelines.errors import AsgoError, RunInterrupted, UsageError
from pipelines.stopping import stop_on_signals

PREFIX = "torchvision:"
_CIFAR = "https://www.cs.toronto.edu/~kriz/"
_DIGITS = [str(digit) for digit in range(10)]

Splits = tuple[Mapping[str, PixelSet], Sequence[str]]
"""The images by split, and the names of the classes."""


@dataclass(frozen=True)
class SetFile:
    """A file of a data set: its name, its MD5, and addresses to download it from."""

    name: str
    md5: str
    urls: tuple[str, ...]

    @property
    def unpacked(self) -> str:
        """The name without `.gz`: torchvision unpacks the file, and reads only the result, whose MD5 is unknown."""
        return self.name.removesuffix(".gz") if not self.name.endswith(".tar.gz") else self.name


@dataclass(frozen=True)
class FileSet:
    """A data set: its folder below torchvision's `root`, its files, and the function that reads these, in order."""

    folder: str
    files: tuple[SetFile, ...]
    read: Callable[..., Splits]


def _mnist(name: str) -> FileSet:
    kind = _torchvision(name)
    files = [SetFile(file, md5, tuple(f"{mirror}{file}" for mirror in kind.mirrors)) for file, md5 in kind.resources]

    def read(*paths: Path) -> Splits:
        return {"train": pixel_files.read_mnist(*paths[:2]), "val": pixel_files.read_mnist(*paths[2:])}, kind.classes

    return FileSet(f"{name}/raw", tuple(files), read)


def _qmnist(name: str) -> FileSet:
    kind = _torchvision(name)
    listed = [*kind.resources["train"], *kind.resources["test"]]
    files = [SetFile(url.rpartition("/")[2], md5, (url,)) for url, md5 in listed]
    return FileSet(f"{name}/raw", tuple(files), _mnist("MNIST").read)


def _emnist(name: str, split: str) -> FileSet:
    kind = _torchvision(name)
    if split not in kind.splits:
        example = f"{PREFIX}{name}:{kind.splits[2]}"
        raise UsageError(f"{PREFIX}{name}: choose one of its splits, {', '.join(kind.splits)}, as in {example}")
    names = [each for each in kind.classes_split_dict[split] if each != "N/A"]
    first = 1 if split == "letters" else 0  # torchvision has a class "N/A" without images there

    def read(archive: Path) -> Splits:
        parts = {"train": "train", "val": "test"}
        sets = {key: pixel_files.read_emnist(archive, split, part) for key, part in parts.items()}
        return {key: PixelSet(each.pixels, each.labels - first) for key, each in sets.items()}, names

    return FileSet(f"{name}/raw", (SetFile("gzip.zip", kind.md5, (kind.url,)),), read)


def _cifar(file: str, md5: str, train: Sequence[str], test: str, names: str, label_bytes: int) -> FileSet:
    read = partial(pixel_files.read_cifar, train=train, test=test, names=names, label_bytes=label_bytes)
    return FileSet("", (SetFile(file, md5, (f"{_CIFAR}{file}",)),), read)


def _svhn(name: str) -> FileSet:
    listed = _torchvision(name).split_list
    files = tuple(SetFile(file, md5, (url,)) for url, file, md5 in (listed["train"], listed["test"]))

    def read(train: Path, test: Path) -> Splits:
        return {"train": pixel_files.read_svhn(train), "val": pixel_files.read_svhn(test)}, _DIGITS

    return FileSet("", files, read)


def _usps(name: str) -> FileSet:
    listed = _torchvision(name).split_list
    files = tuple(SetFile(file, md5, (url,)) for url, file, md5 in (listed["train"], listed["test"]))

    def read(train: Path, test: Path) -> Splits:
        return {"train": pixel_files.read_usps(train), "val": pixel_files.read_usps(test)}, _DIGITS

    return FileSet("", files, read)


def _stl10(name: str) -> FileSet:
    kind = _torchvision(name)
    return FileSet("", (SetFile(kind.filename, kind.tgz_md5, (kind.url,)),), pixel_files.read_stl10)


_CIFAR10_FILES = [f"data_batch_{number}.bin" for number in range(1, 6)], "test_batch.bin", "batches.meta.txt", 1
_CIFAR100_FILES = ["train.bin"], "test.bin", "fine_label_names.txt", 2
# torchvision reads the python version of CIFAR, which is pickled. MD5s of the binary version: the authors' page.
_SETS: Mapping[str, Callable[[], FileSet]] = {
    "CIFAR10": partial(_cifar, "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530", *_CIFAR10_FILES),
    "CIFAR100": partial(_cifar, "cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8", *_CIFAR100_FILES),
    "FashionMNIST": partial(_mnist, "FashionMNIST"),
    "KMNIST": partial(_mnist, "KMNIST"),
    "MNIST": partial(_mnist, "MNIST"),
    "QMNIST": partial(_qmnist, "QMNIST"),
    "STL10": partial(_stl10, "STL10"),
    "SVHN": partial(_svhn, "SVHN"),
    "USPS": partial(_usps, "USPS"),
}


def _torchvision(name: str) -> Any:
    from torchvision import datasets  # takes seconds

    return getattr(datasets, name)


def _file_set(name: str) -> FileSet:
    """Return the data set `name`. Raises `UsageError` for an unknown one."""
    kind, _, split = name.partition(":")
    if kind == "EMNIST":
        return _emnist(kind, split)
    if name not in _SETS:
        known = {each.lower(): each for each in (*_SETS, "EMNIST", *FILE_SETS)}
        nearest = difflib.get_close_matches(kind.lower(), known, n=1)
        hint = f"did you mean {known[nearest[0]]!r}?" if nearest else f"known: {', '.join(sorted(known.values()))}"
        raise UsageError(f"{PREFIX}{name}: unknown data set; {hint}")
    return _SETS[name]()


class TorchvisionImporter:
    """Imports a data set of torchvision by its name, from files below `root`; see `ImageImporter`."""

    command = "images"
    revision = None

    def __init__(self, name: str, root: Path) -> None:
        """Raises `UsageError` for an unknown name."""
        self.dataset = name
        self._set = _file_set(name)
        self._root = root.resolve()
        self.folder = self._root / self._set.folder
        self.options = {SOURCE: f"{PREFIX}{name}", "root": str(self._root)}

    def find(self, report: Progress) -> list[Path]:
        missing = self._missing()
        if missing:
            them = "it" if len(missing) == 1 else "them"
            note, holder = "", "torchvision calls root"
            if "CIFAR" in self.dataset:
                note, holder = (
                    " (only this binary version is read, not torchvision's copy, which is pickled)",
                    "holds it",
                )
            raise UsageError(
                f"{self.folder}: no {', no '.join(file.name for file in missing)}{note}; put {them} there, pass the "
                f"folder that {holder} with --root, or get {them} with --download"
            )
        return self._paths()

    def download(self, progress: Progress, notify: Notify) -> list[str]:
        """Download missing files, or resume that; return their names. They are verified.

        Raises:
            UsageError: the folder is a file, or another process works in it.
            RunInterrupted: SIGTERM or SIGINT; the same call resumes.
            AsgoError: no network, servers that refuse or keep failing, a wrong MD5, a full disk.
        """
        missing = self._missing()
        if missing:
            with stop_on_signals() as stop, held_folder(self.folder):
                retries = Retries(f"check the network, or put the files into {self.folder}", notify, stop)
                for file in missing:
                    self._download(file, retries.stoppable(progress), retries)
        return [file.name for file in missing]

    def expected(self, path: Path) -> str | None:
        known = {file.name: file.md5 for file in self._set.files}
        return f"md5:{known[path.name]}" if path.name in known else None

    def check(self, path: Path, report: Progress) -> str:
        expected = self.expected(path)
        algorithm = "md5" if expected else "sha256"
        digest = f"{algorithm}:{digest_of(path, algorithm, partial(report, f'checking {path.name}'))}"
        if expected not in (None, digest):
            # Linux distributions compress the IDX files again; an unpacked one is checked by its header and length.
            unpack = "; or unpack it, if it is another compression of the same file" * path.name.endswith("ubyte.gz")
            remedy = f"remove it, and get it again with --download{unpack}"
            raise AsgoError(f"{path}: its MD5 is {digest[4:]}, not {expected[4:]}; {remedy}")
        return digest

    def make(self, out: Path, layout: Layout, workers: int, report: Progress) -> Contents:
        report("reading the images", 0, 1)
        sets, names = self._set.read(*self._paths())
        for split, images in sets.items():
            if len(images.labels) != len(images.pixels) or not 0 <= images.labels.min() <= images.labels.max() < len(
                names
            ):
                raise AsgoError(f"{self.folder}: the labels of {split} do not fit its images and {len(names)} classes")
        return import_pixels(sets, numbered_classes(names), out, report)

    def _path(self, file: SetFile) -> Path | None:
        paths = (self.folder / file.unpacked, self.folder / file.name)
        return next((path for path in paths if path.is_file()), None)

    def _paths(self) -> list[Path]:
        return [path for file in self._set.files if (path := self._path(file)) is not None]

    def _missing(self) -> list[SetFile]:
        return [file for file in self._set.files if self._path(file) is None]

    def _download(self, file: SetFile, progress: Progress, retries: Retries) -> None:
        by_hand = f"download it by hand to {self.folder}"
        advice = Advice(no_access=by_hand, elsewhere=by_hand, by_hand=by_hand)
        for number, url in enumerate(file.urls, start=1):
            target = self.folder / file.name
            transfer = Download(
                url, target, length=None, md5=file.md5, advice=advice, progress=progress, retries=retries
            )
            try:
                transfer.run()
                return
            except AsgoError as error:
                if isinstance(error, RunInterrupted) or number == len(file.urls):
                    raise
                retries.notify(f"{error}; trying the next server")
