"""Data sets of torchvision that are image files become folders with the files and labels that torchvision lists."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torchvision import datasets

from pipelines.data.image_sources.source import SourceOptions, prepare_images
from pipelines.data.images.image_sets import open_images
from pipelines.data.images.manifest import ImageManifest, load_image_manifest
from pipelines.errors import AsgoError, RunInterrupted, UsageError

from .image_makers import Files, picture, write_folder
from .test_files_importer import LARGE, contents


def prepare(name: str, root: Path, out: Path, **more: Any) -> ImageManifest:
    report = more.pop("report", lambda *_: None)
    options = SourceOptions(root, **more)
    return prepare_images(
        f"torchvision:{name}", out, options, workers=1, overwrite=False, report=report, notify=lambda _: None
    )


def food(root: Path) -> Path:
    """Write Food-101 with three images of two classes: which are for training is in a table."""
    files: Files = {
        f"images/{name}/{number}.jpg": picture(number, LARGE, "JPEG")
        for name in ("pho", "apple_pie")
        for number in range(3)
    }
    for split, numbers in (("train", [0, 2]), ("test", [1])):
        table = {name: [f"{name}/{number}" for number in numbers] for name in ("pho", "apple_pie")}
        files[f"meta/{split}.json"] = json.dumps(table).encode()
    return write_folder(root / "food-101", files)


def test_the_split_and_the_labels_are_torchvisions(tmp_path: Path) -> None:
    folder = food(tmp_path)
    manifest = prepare("Food101", tmp_path, tmp_path / "out")
    data = open_images(tmp_path / "out")
    assert [(each.id, each.name) for each in data.classes] == [("0", "apple_pie"), ("1", "pho")]
    assert contents(data) == {
        f"{split}/{label}/{number}.jpg": (folder / "images" / name / f"{number}.jpg").read_bytes()
        for split, numbers in (("train", (0, 2)), ("val", (1,)))
        for label, name in enumerate(("apple_pie", "pho"))
        for number in numbers
    }
    theirs = datasets.Food101(tmp_path, split="train")
    assert data.train.labels.tolist() == sorted(theirs[at][1] for at in range(len(theirs)))
    assert manifest.dataset == "Food101"


def test_names_of_classes_and_sets_without_a_split_are_torchvisions(tmp_path: Path) -> None:
    wnids = ("n01440764", "n02102040")
    files = {
        f"{split}/{wnid}/{n}.JPEG": picture(n, LARGE, "JPEG")
        for split in ("train", "val")
        for wnid in wnids
        for n in range(2)
    }
    write_folder(tmp_path / "imagenette2", files)
    names = [each.name for each in prepare("Imagenette", tmp_path, tmp_path / "imagenette").classes]
    assert names == ["tench", "English springer"]
    lands = {
        f"2750/{name}/{name}_{n}.jpg": picture(n, (64, 64), "JPEG") for name in ("Forest", "River") for n in range(8)
    }
    write_folder(tmp_path / "eurosat", lands)
    manifest = prepare("EuroSAT", tmp_path, tmp_path / "lands", val_fraction=0.25)
    assert [(each.name, each.train, each.validation) for each in manifest.classes] == [
        ("Forest", 6, 2),
        ("River", 6, 2),
    ]
    assert manifest.image_shape == (64, 64, 3)


def test_missing_files_are_told_with_their_folder(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"food-101: not the files of Food101 .*Dataset not found.* --root, .*--download$"
    ):
        prepare("Food101", tmp_path, tmp_path / "out")
    with pytest.raises(
        AsgoError, match=r"stanford_cars: torchvision cannot download StanfordCars \(The original URL is"
    ):
        prepare("StanfordCars", tmp_path, tmp_path / "out", download=True)
    (food(tmp_path) / "images" / "pho" / "1.jpg").unlink()
    with pytest.raises(AsgoError, match=r"pho/1\.jpg: No such file"):
        prepare("Food101", tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_it_is_resumed_by_the_command_that_is_named(tmp_path: Path) -> None:
    food(tmp_path)

    def stop(phase: str, done: int, total: int) -> None:
        if phase.startswith("copying"):
            raise RunInterrupted("stopped")

    with pytest.raises(RunInterrupted):
        prepare("Food101", tmp_path, tmp_path / "out", report=stop)
    with pytest.raises(AsgoError, match=rf"resume with: asgo data images torchvision:Food101 --root {tmp_path} --out"):
        load_image_manifest(tmp_path / "out")
    prepare("Food101", tmp_path, tmp_path / "out")
