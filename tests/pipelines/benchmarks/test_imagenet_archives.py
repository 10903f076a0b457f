"""The benchmark compares equals: asgo and torchvision get the same images out of the same archives."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.benchmarks import imagenet_archives
from pipelines.benchmarks.imagenet_archives import bench_archives


def images_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.JPEG")}


def test_both_extract_the_same_images(tmp_path: Path) -> None:
    archives, wnids = tmp_path / "archives", 3
    labels = imagenet_archives._write_archives(archives, wnids, 40, 300)
    imagenet_archives._run_asgo(archives, tmp_path / "ours", 2)
    imagenet_archives._run_torchvision(archives, labels, tmp_path / "theirs")
    assert images_in(tmp_path / "ours") == images_in(tmp_path / "theirs")
    assert len(images_in(tmp_path / "ours")) == wnids * 40 + len(labels.validation)


def test_every_round_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagenet_archives, "_INDEX_IMAGES", 2)
    report = bench_archives(classes=2, images=3, workers=2, repeats=2, progress=lambda what, done, total: None)
    figures = report.as_json()
    assert figures["images"] == 2 * 3 + 2
    assert {name: len(each) for name, each in figures["extraction_s"].items()} == {"asgo": 2, "torchvision": 2}
    assert figures["index_members"] == 100 * (2 + 1) + 100
    seconds = figures["extraction_s"]
    ratios = [peer / own for own, peer in zip(seconds["asgo"], seconds["torchvision"], strict=True)]
    assert figures["extraction_speedup"] == pytest.approx(sum(ratios) / 2)
