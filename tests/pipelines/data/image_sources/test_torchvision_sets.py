"""Data sets of torchvision become folders with torchvision's pixels and labels, and nothing is unpickled."""

from __future__ import annotations

import functools
import gzip
import http.server
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchvision import datasets

from pipelines.data.image_sources import torchvision_sets
from pipelines.data.image_sources.source import SourceOptions, prepare_images
from pipelines.data.images.image_sets import DecodedImages, ImageData, open_images
from pipelines.data.images.manifest import ImageManifest, load_image_manifest
from pipelines.data.images.verify import verify_images
from pipelines.errors import AsgoError, RunInterrupted, UsageError
from tests.pipelines.data.imagenet.archive_makers import tree

from .pixel_makers import (
    Arrays,
    arrays,
    cifar10,
    cifar100,
    emnist_zip,
    idx,
    md5,
    stl10,
    svhn,
    usps,
    write_mnist,
)

TRAIN, TEST = arrays(40, (28, 28, 1)), arrays(20, (28, 28, 1), seed=1)


def prepare(name: str, root: Path, out: Path, **more: Any) -> ImageManifest:
    options = SourceOptions(root, download=more.pop("download", False), extract=more.pop("extract", None))
    given = {"workers": 1, "overwrite": False, "report": lambda *_: None, "notify": lambda _: None}
    return prepare_images(f"torchvision:{name}", out, options, **given | more)


def require_same(data: ImageData, train: Arrays, test: Arrays) -> None:
    """Whether all images and labels are there: for training by class, for validation in the order of the source."""
    for images, (pixels, labels), order in (
        (data.train, train, np.argsort(train[1], kind="stable")),
        (data.validation, test, np.arange(len(test[1]))),
    ):
        assert isinstance(images, DecodedImages)
        np.testing.assert_array_equal(images.pixels, pixels[order])
        np.testing.assert_array_equal(images.labels, labels[order])
        assert images.read(3) == pixels[order[3]].tobytes()


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "KMNIST"])
def test_mnist_has_torchvisions_pixels_labels_and_names(name: str, tmp_path: Path) -> None:
    write_mnist(tmp_path / name / "raw", TRAIN, TEST)
    manifest = prepare(name, tmp_path, tmp_path / "out")
    data = open_images(tmp_path / "out")
    require_same(data, TRAIN, TEST)
    theirs = getattr(datasets, name)(tmp_path, train=False)
    np.testing.assert_array_equal(data.validation.pixels[..., 0], theirs.data)  # type: ignore[attr-defined]
    assert data.validation.labels.tolist() == theirs.targets.tolist()
    assert [each.name for each in data.classes] == theirs.classes
    assert (manifest.layout, manifest.image_shape) == ("decoded", (28, 28, 1))
    assert [(each.train, each.validation) for each in manifest.classes] == [(4, 2)] * 10
    assert verify_images(tmp_path / "out", lambda *_: None) == []


def known(monkeypatch: pytest.MonkeyPatch, name: str, **files: bytes) -> None:
    """Let the files' real digests be known for the data set."""
    whole = torchvision_sets._file_set(name)
    listed = tuple(replace(file, md5=md5(files[file.name])) for file in whole.files)
    monkeypatch.setattr(torchvision_sets, "_file_set", lambda _: replace(whole, files=listed))


@pytest.mark.parametrize(
    ("name", "make", "file"),
    [("CIFAR10", cifar10, "cifar-10-binary.tar.gz"), ("CIFAR100", cifar100, "cifar-100-binary.tar.gz")],
)
def test_cifar_is_read_from_its_binary_version(
    name: str, make: Any, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["air plane", "bird", *(f"class {number}" for number in range(8))]
    train, test = arrays(50, (32, 32, 3)), arrays(20, (32, 32, 3), seed=1)
    (tmp_path / file).write_bytes(content := make(train, test, names))
    known(monkeypatch, name, **{file: content})
    prepare(name, tmp_path, tmp_path / "out")
    data = open_images(tmp_path / "out")
    require_same(data, train, test)
    assert [each.name for each in data.classes] == names


def test_svhn_stl10_and_usps_have_torchvisions_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = arrays(30, (32, 32, 3)), arrays(20, (32, 32, 3), seed=1)
    files = {"train_32x32.mat": svhn(train), "test_32x32.mat": svhn(test)}
    require_same(imported("SVHN", files, tmp_path, monkeypatch), train, test)
    train, test = arrays(20, (96, 96, 3)), arrays(20, (96, 96, 3), seed=1)
    names = [f"thing{number}" for number in range(10)]
    files = {"stl10_binary.tar.gz": stl10(train, test, names)}
    data = imported("STL10", files, tmp_path, monkeypatch)
    require_same(data, train, test)
    assert [each.name for each in data.classes] == names
    train, test = arrays(20, (16, 16, 1)), arrays(20, (16, 16, 1), seed=1)
    data = imported("USPS", {"usps.bz2": usps(train), "usps.t.bz2": usps(test)}, tmp_path, monkeypatch)
    require_same(data, train, test)
    theirs = datasets.USPS(str(tmp_path / "USPS"), train=False)
    np.testing.assert_array_equal(data.validation.pixels[..., 0], theirs.data)  # type: ignore[attr-defined]


def imported(name: str, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageData:
    with monkeypatch.context() as patched:
        known(patched, name, **files)
        folder = tmp_path / name / torchvision_sets._file_set(name).folder
        folder.mkdir(parents=True)
        for file, content in files.items():
            (folder / file).write_bytes(content)
        prepare(name, tmp_path / name, tmp_path / f"made {name}")
    return open_images(tmp_path / f"made {name}")


def test_emnist_has_splits_and_qmnist_more_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = arrays(60, (28, 28, 1), classes=26), arrays(52, (28, 28, 1), classes=26, seed=1)
    from_one = ((train[0], train[1] + 1), (test[0], test[1] + 1))  # as the letters are labelled
    data = imported("EMNIST:letters", {"gzip.zip": emnist_zip("letters", *from_one)}, tmp_path, monkeypatch)
    require_same(data, train, test)
    assert "".join(each.name for each in data.classes) == "abcdefghijklmnopqrstuvwxyz"
    with pytest.raises(UsageError, match=r"choose one of its splits, byclass, .*, as in torchvision:EMNIST:balanced$"):
        prepare("EMNIST", tmp_path, tmp_path / "out")
    columns = np.stack([TRAIN[1], TRAIN[1] + 100], axis=1).astype(">i4")
    parts = [idx(TRAIN[0][..., 0]), idx(columns), idx(TEST[0][..., 0]), idx(TEST[1][:, None].astype(">i4"))]
    names = [file.name for file in torchvision_sets._file_set("QMNIST").files]
    files = {name: gzip.compress(part) for name, part in zip(names, parts, strict=True)}
    require_same(imported("QMNIST", files, tmp_path, monkeypatch), TRAIN, TEST)


def test_missing_files_are_named_with_their_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        prepare("MNIST", tmp_path, tmp_path / "out")
    for words in (str(tmp_path / "MNIST" / "raw"), "no train-images-idx3-ubyte.gz", "--root", "--download"):
        assert words in str(refused.value)
    with pytest.raises(
        UsageError, match=r"no cifar-10-binary\.tar\.gz \(only this binary version .*\); put it there, .* get it with"
    ):
        prepare("CIFAR10", tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "hint"), [("mnist", "did you mean 'MNIST'"), ("CIFAR", "'CIFAR10"), ("Nope", "known: CIFAR10, CIFAR100")]
)
def test_an_unknown_name_is_answered_with_known_ones(name: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=hint):
        prepare(name, tmp_path, tmp_path / "out")


def test_files_are_checked_by_torchvisions_md5(tmp_path: Path) -> None:
    write_mnist(tmp_path / "MNIST" / "raw", TRAIN, TEST, packed=True)
    with pytest.raises(
        AsgoError, match=r"train-images-idx3-ubyte\.gz: its MD5 is \w+, not f68b3c2dcbeaaa9f.*--download; or unpack it"
    ):
        prepare("MNIST", tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("part", "alter", "problem"),
    [
        ("train-images-idx3", lambda content: content[:-1], "truncated: 31,359 bytes of data, not 31,360"),
        ("train-images-idx3", lambda content: content + b"x", "longer than its header says"),
        ("train-images-idx3", lambda content: content[:4] + b"\xff" * 12 + content[16:], "truncated"),
        ("train-images-idx3", lambda content: b"\x1f\x8b" + content, "damaged gzip file"),
        ("train-labels-idx1", lambda content: b"GIF89a" + content, "not an IDX file"),
        ("train-labels-idx1", lambda content: content[:-1] + b"\x0a", "the labels of train do not fit .* 10 classes"),
        ("t10k-labels-idx1", lambda content: content[:8] + bytes(20), "class 1, 1 - one: no images in val"),
    ],
)
def test_damaged_files_are_told_in_one_line(part: str, alter: Any, problem: str, tmp_path: Path) -> None:
    write_mnist(folder := tmp_path / "MNIST" / "raw", TRAIN, TEST)
    path = folder / f"{part}-ubyte"
    path.write_bytes(alter(path.read_bytes()))
    with pytest.raises(AsgoError, match=problem) as refused:
        prepare("MNIST", tmp_path, tmp_path / "out")
    assert "\n" not in str(refused.value)


def test_image_files_cannot_be_had_of_pixels(tmp_path: Path) -> None:
    write_mnist(tmp_path / "MNIST" / "raw", TRAIN, TEST)
    for extract in (True, False):
        with pytest.raises(UsageError, match="--extract and --no-extract: not for torchvision:MNIST; omit it"):
            prepare("MNIST", tmp_path, tmp_path / "out", extract=extract)
    assert not (tmp_path / "out").exists()


def test_the_fingerprint_and_verify_depend_on_every_pixel(tmp_path: Path) -> None:
    write_mnist(tmp_path / "MNIST" / "raw", TRAIN, TEST)
    first = prepare("MNIST", tmp_path, tmp_path / "first")
    assert prepare("MNIST", tmp_path, tmp_path / "again").fingerprint == first.fingerprint
    pixels = TEST[0].copy()
    pixels[7, 3, 5] ^= 1
    write_mnist(tmp_path / "MNIST" / "raw", TRAIN, (pixels, TEST[1]))
    assert prepare("MNIST", tmp_path, tmp_path / "other").fingerprint != first.fingerprint
    path = tmp_path / "first" / "val.images"
    path.write_bytes((tmp_path / "other" / "val.images").read_bytes())
    (problem,) = verify_images(tmp_path / "first", lambda *_: None)
    assert (problem.file, problem.problem) == ("val.images", "altered between byte 0 and byte 15,680")


def test_a_stopped_import_is_resumed_by_the_same_command(tmp_path: Path) -> None:
    write_mnist(tmp_path / "MNIST" / "raw", TRAIN, TEST)
    expected = prepare("MNIST", tmp_path, tmp_path / "expected")
    out = tmp_path / "out"

    def stop_in(phase: str) -> Any:
        def report(now: str, done: int, total: int) -> None:
            if now == phase:
                raise RunInterrupted("stopped")

        return report

    for phase in ("checking t10k-images-idx3-ubyte", "writing train.images", "writing val.images"):
        with pytest.raises(RunInterrupted):
            prepare("MNIST", tmp_path, out, report=stop_in(phase))
        with pytest.raises(AsgoError, match=rf"resume with: asgo data images torchvision:MNIST --root {tmp_path} "):
            load_image_manifest(out)
    assert prepare("MNIST", tmp_path, out) == expected
    assert tree(out) == tree(tmp_path / "expected")


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    handler = functools.partial(_Quiet, directory=tmp_path / "served")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_missing_files_are_downloaded_from_the_next_mirror_if_the_first_has_none(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write_mnist(tmp_path / "served" / "there", TRAIN, TEST, packed=True)
    monkeypatch.setattr(datasets.MNIST, "mirrors", [f"{server}/gone/", f"{server}/there/"])
    monkeypatch.setattr(datasets.MNIST, "resources", [(name, md5(content)) for name, content in files.items()])
    told: list[str] = []
    manifest = prepare("MNIST", tmp_path / "root", tmp_path / "out", download=True, notify=told.append)
    require_same(open_images(tmp_path / "out"), TRAIN, TEST)
    assert {each.digest for each in manifest.source_files} == {f"md5:{md5(each)}" for each in files.values()}
    assert sum("HTTP 404" in line and line.endswith("trying the next server") for line in told) == 4
    monkeypatch.setattr(datasets.MNIST, "mirrors", [f"{server}/gone/"])
    with pytest.raises(AsgoError, match=r"HTTP 404 .*download it by hand to .*MNIST/raw"):
        prepare("MNIST", tmp_path / "elsewhere", tmp_path / "none", download=True)
