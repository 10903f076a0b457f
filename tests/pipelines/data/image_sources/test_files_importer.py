"""Folders and archives of images become the same data set, whole also after kills, or are refused in one line."""

from __future__ import annotations

import hashlib
import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.data.image_sources import files_importer
from pipelines.data.image_sources.source import SourceOptions, prepare_images
from pipelines.data.images.image_sets import DecodedImages, ImageData, open_images
from pipelines.data.images.manifest import ImageManifest, load_image_manifest
from pipelines.data.images.verify import verify_images
from pipelines.data.progress import Progress
from pipelines.errors import AsgoError, RunInterrupted, UsageError
from tests.pipelines.data.imagenet.archive_makers import tree
from tests.pipelines.data.imagenet.kills import KILLS

from .image_makers import (
    Files,
    class_files,
    picture,
    split_files,
    write_folder,
    write_source,
)

KINDS = pytest.mark.parametrize("kind", ["folder", "tar", "tgz", "zip", "stored zip"])
LARGE = (80, 60)


def prepare(
    source: object, out: Path, *, report: Progress = lambda *_: None, overwrite: bool = False, **options: Any
) -> ImageManifest:
    notify: Callable[[str], None] = options.pop("notify", lambda _: None)
    chosen = SourceOptions(**options)
    return prepare_images(str(source), out, chosen, workers=2, overwrite=overwrite, report=report, notify=notify)


def contents(data: ImageData) -> dict[str, bytes]:
    sets = {"train": data.train, "val": data.validation}
    return {
        f"{split}/{images.name(at)}": images.read(at) for split, images in sets.items() for at in range(len(images))
    }


def pixels(content: bytes) -> bytes:
    return np.asarray(Image.open(io.BytesIO(content))).tobytes()


@KINDS
@pytest.mark.parametrize("extract", [True, False, None])
def test_every_kind_of_source_gives_the_same_images_in_every_layout(
    kind: str, extract: bool | None, tmp_path: Path
) -> None:
    files = split_files(size=LARGE)
    source = write_source(tmp_path, kind, files)
    manifest = prepare(source, tmp_path / "out", extract=extract)
    data = open_images(tmp_path / "out")
    assert contents(data) == files
    assert data.fingerprint == prepare(write_folder(tmp_path / "as folder", files), tmp_path / "expected").fingerprint
    assert manifest.layout == ("extracted" if extract else "packed")
    assert bool(manifest.containers) == (kind in ("tar", "stored zip") and not extract)
    assert [(each.id, each.train, each.validation) for each in manifest.classes] == [("cat", 4, 2), ("dog", 4, 2)]
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4
    assert [data.validation.name(at) for at in range(4)] == ["cat/0.png", "dog/0.png", "cat/1.png", "dog/1.png"]
    assert verify_images(tmp_path / "out", lambda *_: None) == []
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.name.startswith((".", "un"))) == []


@KINDS
def test_small_images_of_one_size_are_decoded(kind: str, tmp_path: Path) -> None:
    files = split_files()
    manifest = prepare(write_source(tmp_path, kind, files), tmp_path / "out")
    data = open_images(tmp_path / "out")
    assert (manifest.layout, manifest.image_shape) == ("decoded", (16, 24, 3))
    assert contents(data) == {path: pixels(content) for path, content in files.items()}
    assert isinstance(data.train, DecodedImages)
    assert data.validation.labels.tolist() == [0, 1, 0, 1], "in the order of the names"
    assert verify_images(tmp_path / "out", lambda *_: None) == []
    assert data.fingerprint == prepare(write_folder(tmp_path / "again", files), tmp_path / "same").fingerprint
    files["val/dog/1.png"] = picture(99)
    assert data.fingerprint != prepare(write_folder(tmp_path / "other", files), tmp_path / "differs").fingerprint


@pytest.mark.parametrize(
    ("files", "shape"),
    [
        ({f"{name}/{n}.jpg": picture(n, kind="JPEG", mode="L") for name in "ab" for n in range(3)}, (16, 24, 1)),
        ({f"{name}/{n}.png": picture(n, (64, 9), mode=mode) for name in "ab" for n, mode in
          enumerate(("L", "RGB"))}, (9, 64, 3)),
        ({f"{name}/{n}.png": picture(n, (65, 8)) for name in "ab" for n in range(3)}, None),
        ({f"{name}/{n}.png": picture(n, (8 + n, 8)) for name in "ab" for n in range(3)}, None),
        ({f"{name}/1.{kind}": picture(1, kind=kind.upper()) for name in "ab" for kind in
          ("webp", "BMP", "gif", "Ppm", "tiff")}, (16, 24, 3)),
    ],
    ids=["grey", "grey and colours", "too large", "two sizes", "formats"],
)  # fmt: skip
def test_what_is_decoded_depends_on_sizes_and_colours(files: Files, shape: Any, tmp_path: Path) -> None:
    manifest = prepare(write_folder(tmp_path / "photos", files), tmp_path / "out")
    assert manifest.image_shape == shape
    data = open_images(tmp_path / "out")
    if shape == (16, 24, 1):
        name = data.train.name(0)
        assert data.train.read(0) == pixels(files[name])


def test_the_split_is_stratified_and_depends_on_names_only(tmp_path: Path) -> None:
    files = class_files({"cat": 30, "dog": 11, "eel": 2})
    manifest = prepare(write_folder(tmp_path / "photos", files), tmp_path / "out", extract=False)
    assert [(each.id, each.train, each.validation) for each in manifest.classes] == [
        ("cat", 27, 3),
        ("dog", 10, 1),
        ("eel", 1, 1),
    ]
    chosen = {name.removeprefix("val/") for name in contents(open_images(tmp_path / "out")) if name.startswith("val/")}
    for class_id in ("cat", "dog", "eel"):
        names = sorted(
            (name for name in files if name.startswith(class_id)),
            key=lambda name: hashlib.sha256(name.encode()).digest(),
        )
        assert {name for name in chosen if name.startswith(class_id)} == set(names[: max(1, round(len(names) / 10))])
    backwards = write_folder(tmp_path / "backwards", dict(reversed(files.items())))
    assert prepare(backwards, tmp_path / "again", extract=False).fingerprint == manifest.fingerprint
    third = prepare(backwards, tmp_path / "third", extract=False, val_fraction=1 / 3)
    assert [each.validation for each in third.classes] == [10, 4, 1]


@pytest.mark.parametrize(("fraction", "real"), [(0.001, "2 of 16 .* 0.12;"), (0.999, "14 of 16 .* 0.88;"), (0.2, "")])
def test_a_fraction_that_small_classes_cannot_have_is_told(fraction: float, real: str, tmp_path: Path) -> None:
    source, told = write_folder(tmp_path / "photos", class_files({"cat": 8, "dog": 8})), list[str]()
    prepare(source, tmp_path / "out", val_fraction=fraction, notify=told.append)
    assert [bool(re.match(f"--val-fraction {fraction}: {real}", line)) for line in told] == [True] * bool(real)


@pytest.mark.parametrize(
    ("names", "used"),
    [
        (("train", "val", "test"), "val"),
        (("training", "Validation", "test"), "Validation"),
        (("Train", "valid"), "valid"),
        (("train", "test"), "test"),
        (("train",), None),
    ],
)
def test_folders_of_splits_are_found_by_their_names(names: tuple[str, ...], used: str | None, tmp_path: Path) -> None:
    files = {
        f"deep/{split}/{class_id}/{n}.jpg": picture(10 * place + n, LARGE)
        for place, split in enumerate(names)
        for class_id in ("a", "b")
        for n in range(4)
    }
    told: list[str] = []
    manifest = prepare(write_folder(tmp_path / "photos", files), tmp_path / "out", notify=told.append)
    made = contents(open_images(tmp_path / "out"))
    for name, content in made.items():
        split, _, rest = name.partition("/")
        folder = names[0] if split == "train" or used is None else used
        assert content == files[f"deep/{folder}/{rest}"]
    assert [(each.train, each.validation) for each in manifest.classes] == [(4, 4) if used else (3, 1)] * 2
    assert told == [f"{tmp_path}/photos/deep/{each}: not used" for each in names if each not in (names[0], used)]


def kaggle(*, flat: bool = True) -> tuple[Files, Files]:
    """Kaggle's files and the images that they hold."""
    base, names = "ILSVRC/Data/CLS-LOC", {"n01440764": "tench, Tinca tinca", "n02119789": "kit fox, Vulpes macrotis"}
    images = {
        f"{split}/{wnid}/{wnid}_{n}.JPEG": picture(100 * label + n + 50 * (split == "val"), LARGE, "JPEG")
        for split in ("train", "val")
        for label, wnid in enumerate(names)
        for n in range(3)
    }
    files = {f"{base}/{path}": content for path, content in images.items()}
    if flat:
        rows = ["ImageId,PredictionString"]
        for path in [path for path in images if path.startswith("val/")]:
            _, wnid, name = path.split("/")
            files[f"{base}/val/{name}"] = files.pop(f"{base}/{path}")
            rows.append(f"{name.removesuffix('.JPEG')},{wnid} 1 2 3 4 {wnid} 5 6 7 8")
        files["LOC_val_solution.csv"] = "\n".join(rows).encode()
    files["LOC_synset_mapping.txt"] = "".join(f"{wnid} {name}\n" for wnid, name in names.items()).encode()
    files |= {f"{base}/test/ILSVRC2012_test_{n}.JPEG": picture(n) for n in range(2)}
    return files | {"ILSVRC/Annotations/CLS-LOC/val/x.xml": b"x", "ILSVRC/ImageSets/x.txt": b"x"}, images


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("given", ["", "ILSVRC", "ILSVRC/Data/CLS-LOC", "tgz", "zip"])
def test_kaggles_imagenet_is_imported_with_its_names(given: str, flat: bool, tmp_path: Path) -> None:
    files, images = kaggle(flat=flat)
    source = (
        write_source(tmp_path, given, files)
        if given in ("tgz", "zip")
        else write_source(tmp_path, "folder", files) / given
    )
    prepare(source, tmp_path / "out")
    data = open_images(tmp_path / "out")
    assert [(each.id, each.name) for each in data.classes] == [("n01440764", "tench"), ("n02119789", "kit fox")]
    assert contents(data) == images


def test_tiny_imagenet_is_imported_with_its_names(tmp_path: Path) -> None:
    images = {
        f"{split}/{wnid}/{wnid}_{split}_{n}.JPEG": picture(n, (64, 64), "JPEG")
        for split in ("train", "val")
        for wnid in ("n01443537", "n01629819")
        for n in range(2)
    }
    files: Files = {"words.txt": b"n01443537\tgoldfish, Carassius auratus\nn01629819\tEuropean fire salamander\n"}
    table = []
    for path, content in images.items():
        split, wnid, name = path.split("/")
        files[f"train/{wnid}/images/{name}" if split == "train" else f"val/images/{name}"] = content
        table += [f"{name}\t{wnid}\t0\t32\t44\t62\n"] * (split == "val")
    files |= {"val/val_annotations.txt": "".join(table).encode(), "wnids.txt": b"x", "test/images/0.JPEG": picture(0)}
    files |= {f"train/{wnid}/{wnid}_boxes.txt": b"x" for wnid in ("n01443537", "n01629819")}
    manifest = prepare(write_folder(tmp_path / "tiny-imagenet-200", files), tmp_path / "out", skip_bad=True)
    assert [(each.id, each.name) for each in manifest.classes] == [
        ("n01443537", "goldfish"),
        ("n01629819", "European fire salamander"),
    ]
    assert manifest.image_shape == (64, 64, 3)
    assert contents(open_images(tmp_path / "out")).keys() == images.keys()


@KINDS
def test_what_systems_add_to_folders_is_ignored(kind: str, tmp_path: Path) -> None:
    files = split_files(size=LARGE)
    added = {"__MACOSX/train/cat/._0.png": b"x", ".DS_Store": b"x", "train/cat/Thumbs.db": b"x", "README.md": b"x"}
    added |= {"train/cat/._0.png": b"x", "val/.ipynb_checkpoints/0.png": b"x", "train/dog/desktop.ini": b"x"}
    prepare(write_source(tmp_path, kind, files | added), tmp_path / "out")
    assert contents(open_images(tmp_path / "out")) == files


@KINDS
def test_files_that_are_no_images_are_counted_or_skipped(kind: str, tmp_path: Path) -> None:
    files = split_files(size=LARGE)
    bad = {"train/cat/666.jpg": b"", "train/cat/notes.txt": b"x", "val/dog/page.png": b"<html>404</html>"}
    source = write_source(tmp_path, kind, files | bad)
    with pytest.raises(AsgoError, match=r"train/cat/notes\.txt: not an image \(and 2 files more\); .* --skip-bad$"):
        prepare(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    told: list[str] = []
    prepare(source, tmp_path / "out", skip_bad=True, notify=told.append)
    assert contents(open_images(tmp_path / "out")) == files
    assert [line.partition(": not")[2] for line in told] == [" an image (and 2 files more): skipped"]


BAD: dict[str, tuple[Files, str]] = {
    "empty": ({}, "no folders of classes; expected are train/CLASS/IMAGE"),
    "no classes": ({"0.png": picture(0)}, r"0\.png: an image that is not in a folder of its class; expected"),
    "other files": ({"a.csv": b"x", "b.parquet": b"x"}, "no folders of classes; expected"),
    "one class": ({f"cat/{n}.png": picture(n) for n in range(3)}, "only the class 'cat'; a classifier needs two"),
    "nested": ({**split_files(), "train/cat/more/1.png": picture(9)}, "cat/more: a folder in a folder of a class"),
    "train only": ({**split_files(), "train/eel/1.png": picture(9)}, "class 'eel' has no images in val$"),
    "val only": ({**split_files(), "val/e/1.png": picture(9), "val/f/1.png": picture(9)},
                 r"class 'e' has no images in train \(and 1 classes more\)"),
    "an empty class": ({**class_files({"a": 3, "b": 3}), "c/.keep": b""}, "class 'c' has no images"),
    "a class of one": (class_files({"a": 3, "b": 1}), "class 'b' has one image, too few to split"),
    "case": ({**class_files({"Cat": 3, "dog": 3}), **class_files({"cat": 3})}, "'Cat' and 'cat' differ in case only"),
    "flat splits": ({"train/1.png": picture(1), "test/1.png": picture(2)}, r"train/1\.png: an image that is not in"),
    "flat val": ({**split_files(), "val/1.png": picture(1)}, r"val/1\.png: not in a folder of its class, and without"),
    "val without train": ({"val/a/1.png": picture(1), "val/b/1.png": picture(1), "more/x": b""},
                          "val: a folder of validation images, without one of training images"),
    "control characters": (class_files({"a\x1b[2J": 3, "b": 3}), r"'a\\x1b\[2J' is too long or not printable"),
}  # fmt: skip


@pytest.mark.parametrize(("files", "problem"), BAD.values(), ids=BAD)
def test_folders_that_are_no_data_set_are_refused_in_one_line(files: Files, problem: str, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(AsgoError, match=problem) as refused:
        prepare(write_folder(tmp_path / "photos", files), tmp_path / "out")
    assert str(refused.value).startswith(str(tmp_path / "photos"))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_names_that_are_not_utf_8_and_broken_links_are_refused(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "photos", class_files({"a": 3, "b": 3}))
    (source / "a" / os.fsdecode(b"caf\xe9.png")).write_bytes(picture(0))
    with pytest.raises(AsgoError, match=r"'caf\\udce9\.png' is too long or not printable"):
        prepare(source, tmp_path / "out")
    (source / "a" / os.fsdecode(b"caf\xe9.png")).unlink()
    (source / "a" / "gone.png").symlink_to("nowhere")
    with pytest.raises(AsgoError, match=r"a/gone\.png: neither a file nor a folder \(a broken link\?\)"):
        prepare(source, tmp_path / "out")
    (source / "a" / "gone.png").unlink()
    (source / "c").symlink_to(source / "a")
    (source / "b" / "linked.png").symlink_to(source / "a" / "a_0.png")
    assert [each.train + each.validation for each in prepare(source, tmp_path / "out").classes] == [3, 4, 3]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files_are_named(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "photos", class_files({"a": 3, "b": 3}))
    (source / "b" / "b_1.png").chmod(0)
    with pytest.raises(AsgoError, match=r"b_1\.png: Permission denied"):
        prepare(source, tmp_path / "out")


def test_what_is_no_source_is_refused(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "photos", split_files())
    (tmp_path / "a.csv").write_text("x,y\n" * 200)
    (tmp_path / "a.tar.bz2").write_bytes(b"BZh9" + bytes(400))
    for given, out, problem in (
        (tmp_path / "nowhere", "out", r"nowhere: no such folder or archive; .*torchvision:NAME"),
        (tmp_path / "a.csv", "out", r"a\.csv: neither a folder nor an archive \(\.zip, \.tar"),
        (tmp_path / "a.tar.bz2", "out", r"a\.tar\.bz2: compressed with bzip2; decompress it first"),
        (source, "photos/made", "in the source .*choose another"),
        (source, "photos", "in the source .*choose another"),
    ):
        with pytest.raises(AsgoError, match=problem):
            prepare(given, tmp_path / out)
    prepare(source, tmp_path / "out")
    with pytest.raises(UsageError, match=r"already a folder of `asgo data`; train on it with --data"):
        prepare(tmp_path / "out", tmp_path / "again")
    for options, problem in (
        ({"val_fraction": 0.5}, "--val-fraction: .*has validation images, so it is not used"),
        ({"val_fraction": 1.0}, "--val-fraction should be between 0 and 1, not 1"),
        ({"root": tmp_path}, "--root: not for"),
        ({"download": True}, "--download: not for"),
    ):
        with pytest.raises(UsageError, match=problem):
            prepare(source, tmp_path / "more", **options)
    assert not (tmp_path / "more").exists()


def test_what_would_take_too_much_memory_or_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_folder(tmp_path / "photos", split_files())
    with monkeypatch.context() as patched:
        patched.setattr(files_importer, "MAX_IMAGE_BYTES", 1000)
        with pytest.raises(AsgoError, match=r"train/cat/0\.png: 1,\d+ bytes, more than the limit of 1,000"):
            prepare(source, tmp_path / "out")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2 * 16 * 24 * 3 * 12 - 1))
    with pytest.raises(AsgoError, match=r"out: the images take .* are free; free some space, or choose another --out"):
        prepare(source, tmp_path / "out")


class _Stop(Exception):
    """Ends an import."""


def stopping_at(moment: int) -> Progress:
    """Return a report that raises at a given call."""
    calls = iter(range(moment))

    def report(phase: str, done: int, total: int) -> None:
        if next(calls, None) is None:
            raise _Stop

    return report


@KINDS
@pytest.mark.parametrize("size", [(24, 16), LARGE])
def test_stopped_at_any_report_it_ends_with_the_same_folder(
    kind: str, size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files_importer, "_PART_BYTES", 5000)
    source = write_source(tmp_path, kind, split_files(6, 3, size))
    expected = prepare(source, tmp_path / "expected"), tree(tmp_path / "expected")
    for moment in range(1, 90, 4):
        try:
            prepare(source, tmp_path / "out", report=stopping_at(moment))
        except _Stop:
            assert not (tmp_path / "out" / "manifest.json").exists()
    assert (prepare(source, tmp_path / "out"), tree(tmp_path / "out")) == expected


CHILD = """
import sys
from pathlib import Path
from pipelines.data.image_sources import files_importer
from pipelines.data.image_sources.source import SourceOptions, prepare_images

files_importer._PART_BYTES = 20_000
print("begins", flush=True)
options = SourceOptions(extract={"": None, "extract": True}[sys.argv[3]])
prepare_images(sys.argv[1], Path(sys.argv[2]), options, workers=2, overwrite=False, report=lambda *_: None,
               notify=lambda _: None)
"""


@pytest.mark.parametrize("extract", ["extract", ""])
@pytest.mark.parametrize("size", [(24, 16), LARGE])
def test_killed_again_and_again_it_ends_with_the_same_folder(
    extract: str, size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files_importer, "_PART_BYTES", 20_000)  # as in the children: a part is resumed by its number
    source = write_source(tmp_path, "zip", split_files(60, 20, size))
    expected = prepare(source, tmp_path / "expected", extract=True if extract else None), tree(tmp_path / "expected")
    rng = random.Random(0)
    for _ in range(KILLS):
        command = [sys.executable, "-c", CHILD, str(source), str(tmp_path / "out"), extract]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(rng.uniform(0, 0.5))
            child.kill()
    assert (prepare(source, tmp_path / "out", extract=True if extract else None), tree(tmp_path / "out")) == expected


def test_a_signal_ends_it_so_that_it_can_be_resumed(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "photos", split_files(size=LARGE))

    def report(phase: str, done: int, total: int) -> None:
        if phase.startswith("copying"):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(RunInterrupted, match=r"SIGTERM while copying to train\.images; run the same command again"):
        prepare(source, tmp_path / "out", report=report)
    with pytest.raises(AsgoError, match=rf"resume with: asgo data images {source} --out {tmp_path}/out$"):
        load_image_manifest(tmp_path / "out")
    prepare(source, tmp_path / "out")


def test_a_source_that_changed_meanwhile_is_noticed(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "photos", split_files(size=LARGE))
    with pytest.raises(_Stop):
        prepare(source, tmp_path / "out", report=stopping_at(8))
    path = source / "val" / "dog" / "1.png"
    os.utime(path, ns=(1, 1))
    with pytest.raises(UsageError, match=r"photos: has changed since .*out was started; pass --overwrite"):
        prepare(source, tmp_path / "out")
    prepare(source, tmp_path / "out", overwrite=True)

    def shorten(phase: str, done: int, total: int) -> None:
        if phase.startswith("copying"):
            path.write_bytes(b"\x89PNG")

    with pytest.raises(AsgoError, match=r"1\.png: its size has changed since the folder was listed"):
        prepare(source, tmp_path / "other", report=shorten)


def test_other_options_than_before_are_named(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "photos", class_files({"a": 8, "b": 8}))
    prepare(source, tmp_path / "out", val_fraction=0.25, skip_bad=True)
    with pytest.raises(
        UsageError, match=r"complete, made with --val-fraction 0\.25 and not --val-fraction none, --skip-bad and"
    ):
        prepare(source, tmp_path / "out")
    with pytest.raises(UsageError, match="made with neither --extract nor --no-extract and not --extract"):
        prepare(source, tmp_path / "out", val_fraction=0.25, skip_bad=True, extract=True)


def test_an_archive_that_is_read_in_place_must_stay(tmp_path: Path) -> None:
    source = write_source(tmp_path, "tar", split_files(size=LARGE))
    prepare(source, tmp_path / "out")
    shutil.move(source, tmp_path / "elsewhere.tar")
    with pytest.raises(AsgoError, match=r"photos\.tar: missing; restore it, or pass .* asgo data images ARCHIVE --out"):
        open_images(tmp_path / "out")


@KINDS
@pytest.mark.parametrize("size", [(24, 16), LARGE])
def test_damaged_images_are_named_or_skipped(kind: str, size: tuple[int, int], tmp_path: Path) -> None:
    """Small images of one size are stored as pixels, large ones as they are."""
    files = split_files(size=size)
    bad = {path: files[path][: len(files[path]) // 2] for path in ("train/dog/2.png", "val/cat/1.png")}
    bad["train/cat/9.jpg"] = picture(9, size, "JPEG")[:-200]
    source = write_source(tmp_path, kind, files | bad)
    with pytest.raises(
        AsgoError,
        match=r"photos.*(dog/2|cat/1|cat/9)\.(png|jpg): this image cannot be decoded: .* \(and 2 files more\); "
        r"remove such files, or pass --skip-bad$",
    ):
        prepare(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    told: list[str] = []
    phases: list[str] = []
    prepare(source, tmp_path / "out", skip_bad=True, notify=told.append, report=lambda phase, *_: phases.append(phase))
    assert [line.rpartition(") (and")[2] for line in told] == [" 2 files more): skipped"]
    assert "checking the images" in phases
    assert contents(open_images(tmp_path / "out")).keys() == files.keys() - bad.keys()
