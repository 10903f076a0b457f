"""Read the files of small image data sets that hold pixels: IDX (MNIST), CIFAR's and STL-10's records, SVHN, USPS."""

from __future__ import annotations

import bz2
import math
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from pipelines.data.images.pixels import PixelSet
from pipelines.data.unpacking import unpack, unpacked
from pipelines.errors import AsgoError

_IDX_TYPES = {0x08: "u1", 0x0C: ">i4"}
_PIECE = 1 << 20
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError, OSError)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn the errors of a damaged file into `AsgoError` with its name."""
    try:
        yield
    except _DAMAGE as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise AsgoError(f"{path}: cannot be read ({reason})") from None


def read_idx(stream: BinaryIO, name: str) -> NDArray[Any]:
    """Return the array of an IDX file. Raises `AsgoError` with `name` for other files, and for a wrong length."""
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _IDX_TYPES or not 1 <= magic[3] <= 3:
        raise AsgoError(f"{name}: not an IDX file of images or labels")
    shape = np.frombuffer(_exactly(stream, 4 * magic[3], name), ">u4").tolist()
    dtype = np.dtype(_IDX_TYPES[magic[2]])
    content = _exactly(stream, math.prod(shape) * dtype.itemsize, name)
    if stream.read(1):
        raise AsgoError(f"{name}: longer than its header says")
    return np.frombuffer(content, dtype).reshape(shape)


def _exactly(stream: BinaryIO, count: int, name: str) -> bytearray:
    """Read `count` bytes, which a header claims: memory grows only with what is there."""
    content = bytearray()
    while len(content) < count:
        piece = stream.read(min(_PIECE, count - len(content)))
        if not piece:
            raise AsgoError(f"{name}: truncated: {len(content):,} bytes of data, not {count:,}")
        content += piece
    return content


def read_mnist(images: Path, labels: Path) -> PixelSet:
    """Return a split of MNIST's kind from its two IDX files, plain or gzipped."""
    with unpacked(images) as stream:
        pixels = read_idx(stream, str(images))
    with unpacked(labels) as stream:
        numbers = read_idx(stream, str(labels))
    return _grey(pixels, numbers, str(images))


def read_emnist(archive: Path, split: str, part: str) -> PixelSet:
    """Return "train" or "test" of a split of EMNIST, such as "balanced", from `gzip.zip`."""
    pixels, labels = (
        _read_zipped_idx(archive, f"gzip/emnist-{split}-{part}-{kind}-ubyte.gz")
        for kind in ("images-idx3", "labels-idx1")
    )
    return _grey(pixels, labels, str(archive))


def _read_zipped_idx(archive: Path, name: str) -> NDArray[Any]:
    with (
        _naming(archive),
        zipfile.ZipFile(archive) as files,
        files.open(name) as member,
        unpack(cast(BinaryIO, member), name) as stream,
    ):
        return read_idx(stream, f"{archive}: {name}")


def _grey(pixels: NDArray[Any], labels: NDArray[Any], name: str) -> PixelSet:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or len(labels) != len(pixels) or not pixels.size:
        raise AsgoError(
            f"{name}: {pixels.shape} values with labels of {labels.shape}, which are not images with one label each"
        )
    # QMNIST has eight columns of labels; the first is the class.
    return PixelSet(pixels[..., None], labels.reshape(len(labels), -1)[:, 0].astype(np.int64))


def read_cifar(
    archive: Path, train: Sequence[str], test: str, names: str, label_bytes: int
) -> tuple[dict[str, PixelSet], list[str]]:
    """Return the splits and the class names of CIFAR's binary version.

    A record is `label_bytes` labels, of which the last is used (CIFAR-100's fine label), then 32 x 32 red, green and
    blue values.
    """
    content = _members(archive, [*train, test, names])
    sets = {}
    for split, files in (("train", train), ("val", [test])):
        with _naming(archive):
            rows = np.frombuffer(b"".join(content[name] for name in files), np.uint8).reshape(-1, label_bytes + 3072)
        pixels = rows[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        sets[split] = PixelSet(pixels, rows[:, label_bytes - 1].astype(np.int64))
    return sets, _lines(content[names])


def read_stl10(archive: Path) -> tuple[dict[str, PixelSet], list[str]]:
    """Return the labelled splits and the class names of STL-10; its pixels are stored by columns."""
    splits = {"train": "train", "val": "test"}
    files = [f"{part}_{kind}.bin" for part in splits.values() for kind in "Xy"]
    content = _members(archive, [*files, "class_names.txt"])
    sets = {}
    for split, part in splits.items():
        with _naming(archive):
            pixels = np.frombuffer(content[f"{part}_X.bin"], np.uint8).reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)
        labels = np.frombuffer(content[f"{part}_y.bin"], np.uint8).astype(np.int64) - 1
        sets[split] = PixelSet(pixels, labels)
    return sets, _lines(content["class_names.txt"])


def _lines(content: bytes) -> list[str]:
    return [line for line in content.decode(errors="replace").splitlines() if line.strip()]


def _members(archive: Path, wanted: Sequence[str]) -> dict[str, bytes]:
    """Return files of a verified tar.gz archive by their names without folder."""
    found = {}
    with _naming(archive), tarfile.open(archive, "r|gz") as tar:
        for member in tar:
            name = PurePosixPath(member.name).name
            if name in wanted and member.isreg() and (file := tar.extractfile(member)) is not None:
                found[name] = file.read()
    for name in wanted:
        if name not in found:
            raise AsgoError(f"{archive}: holds no {name}")
    return found


def read_svhn(path: Path) -> PixelSet:
    """Return a split of SVHN's cropped digits. The files label the digit 0 as 10."""
    import scipy.io

    try:
        content = scipy.io.loadmat(path, variable_names=("X", "y"))
        pixels, labels = content["X"].transpose(3, 0, 1, 2), content["y"].astype(np.int64).ravel()
    except Exception as error:  # scipy's parser raises many kinds of errors on damaged files
        raise AsgoError(f"{path}: cannot be read ({type(error).__name__})") from None
    return PixelSet(pixels, labels % 10)


def read_usps(path: Path) -> PixelSet:
    """Return a split of USPS: lines of a label from 1 and of 256 values `index:value` between -1 and 1."""
    with _naming(path), bz2.open(path, "rt", encoding="ascii") as lines:
        rows = [[float(word.rpartition(":")[2]) for word in line.split()] for line in lines]
        values = np.array(rows, np.float32)
        pixels = ((values[:, 1:] + 1) / 2 * 255).astype(np.uint8).reshape(-1, 16, 16, 1)
    return PixelSet(pixels, values[:, 0].astype(np.int64) - 1)
