"""Small files of the data sets that hold pixels, in the formats of the real ones."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Pixels (images, height, width, channels) and labels (images,)."""


def arrays(count: int, shape: tuple[int, int, int], classes: int = 10, seed: int = 0) -> Arrays:
    """Random images of all classes."""
    rng = np.random.default_rng([seed, *shape])
    labels = rng.permutation(np.arange(count) % classes)
    return rng.integers(0, 256, (count, *shape), dtype=np.uint8), labels


def idx(values: NDArray[Any]) -> bytes:
    kind = {"u1": 0x08, "i4": 0x0C}[values.dtype.str[1:]]
    return bytes([0, 0, kind, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.tobytes()


def write_mnist(folder: Path, train: Arrays, test: Arrays, *, packed: bool = False) -> dict[str, bytes]:
    """Write the four IDX files into `folder`; return their content by name."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for part, (pixels, labels) in (("train", train), ("t10k", test)):
        files[f"{part}-images-idx3-ubyte"] = idx(pixels[..., 0])
        files[f"{part}-labels-idx1-ubyte"] = idx(labels.astype(np.uint8))
    if packed:
        files = {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in files.items()}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return files


def emnist_zip(split: str, train: Arrays, test: Arrays) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for part, (pixels, labels) in (("train", train), ("test", test)):
            for kind, content in (("images-idx3", pixels[..., 0]), ("labels-idx1", labels.astype(np.uint8))):
                archive.writestr(f"gzip/emnist-{split}-{part}-{kind}-ubyte.gz", gzip.compress(idx(content)))
    return buffer.getvalue()


def tar_gz(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"folder/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def cifar10(train: Arrays, test: Arrays, names: list[str]) -> bytes:
    parts = np.array_split(np.arange(len(train[0])), 5)
    files = {f"data_batch_{n}.bin": cifar_rows(train[0][at], train[1][at]) for n, at in enumerate(parts, start=1)}
    files |= {"test_batch.bin": cifar_rows(*test), "batches.meta.txt": ("\n".join(names) + "\n\n").encode()}
    return tar_gz(files)


def cifar100(train: Arrays, test: Arrays, names: list[str]) -> bytes:
    """Each fine label has another, coarse one before it."""
    files = {"train.bin": cifar_rows(*train, coarse=True), "test.bin": cifar_rows(*test, coarse=True)}
    return tar_gz(files | {"fine_label_names.txt": ("\n".join(names) + "\n").encode()})


def cifar_rows(pixels: NDArray[np.uint8], labels: NDArray[np.int64], *, coarse: bool = False) -> bytes:
    columns = [labels[:, None] // 5] * coarse + [labels[:, None]]
    planes = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)
    return np.concatenate([*columns, planes], axis=1).astype(np.uint8).tobytes()


def stl10(train: Arrays, test: Arrays, names: list[str]) -> bytes:
    files = {"unlabeled_X.bin": b"?" * 100, "class_names.txt": "\n".join(names).encode()}
    for part, (pixels, labels) in (("train", train), ("test", test)):
        files[f"{part}_X.bin"] = pixels.transpose(0, 3, 2, 1).tobytes()
        files[f"{part}_y.bin"] = (labels + 1).astype(np.uint8).tobytes()
    return tar_gz(files)


def svhn(images: Arrays) -> bytes:
    import scipy.io

    pixels, labels = images
    buffer = io.BytesIO()
    columns = np.where(labels == 0, 10, labels)[:, None].astype(np.uint8)
    scipy.io.savemat(buffer, {"X": pixels.transpose(1, 2, 3, 0), "y": columns}, do_compression=True)
    return buffer.getvalue()


def usps(images: Arrays) -> bytes:
    """Values between -1 and 1 with enough digits to be exact again."""
    lines = []
    for pixels, label in zip(*images, strict=True):
        values = (pixels.ravel() + 0.5) / 255 * 2 - 1
        lines.append(" ".join([str(label + 1), *(f"{at}:{value:.6f}" for at, value in enumerate(values, start=1))]))
    return bz2.compress(("\n".join(lines) + "\n").encode())


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()
