"""The benchmark of loading measures what it says, on the same photographs for all."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.benchmarks import loader
from pipelines.benchmarks.loader import ARCHIVES, EXACT, FILES, TORCHVISION, bench_loader
from pipelines.errors import UsageError


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few images, made by the process itself."""
    for name, value in {"BATCH_SIZE": 4, "BATCHES": 3, "_PHOTOGRAPHS": 6}.items():
        monkeypatch.setattr(loader, name, value)


def silent(what: str, done: int, total: int) -> None: ...


def test_all_ways_are_timed_in_turns_and_show_the_same(monkeypatch: pytest.MonkeyPatch):
    turns = []
    report = bench_loader([], 0, 2, lambda *turn: turns.append(turn))
    names = [TORCHVISION, FILES, ARCHIVES, EXACT]
    assert turns == [(name, turn, 8) for turn, name in enumerate(names * 2)]
    assert [each.name for each in report.contestants] == names
    assert all(len(each.rates) == 2 and min(each.rates) > 0 for each in report.contestants)
    assert report.largest_difference == pytest.approx(1, abs=0.01)
    assert 0 < report.mean_difference < 0.01
    assert report.photographs == 6
    assert report.image_bytes > 10_000
    assert report.speedup(TORCHVISION) == 1
    first, second = (own / their for own, their in zip(*(report.contestants[at].rates for at in (1, 0)), strict=True))
    assert report.as_json()["loading"][1]["speedup"] == pytest.approx((first + second) / 2)
    assert report.as_json()["archives_over_files"] == report.speedup(ARCHIVES, FILES)


def test_photographs_are_all_of_500_by_375_and_not_the_same(tmp_path: Path):
    for number, size in enumerate([(600, 300), (200, 900)]):
        noise = np.random.default_rng(number).integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{number}.png")
    (tmp_path / "readme.txt").write_text("no photograph")
    report = bench_loader([tmp_path], 0, 1, silent)
    assert report.photographs == 6
    photographs = set(loader._photographs([tmp_path]))
    assert len(photographs) == 6
    assert {Image.open(io.BytesIO(each)).size for each in photographs} == {(500, 375)}
    assert report.image_bytes > 100_000  # noise, and not matplotlib's


def test_what_is_no_photograph_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UsageError, match="no photographs"):
        bench_loader([tmp_path], 0, 1, silent)
    (tmp_path / "text.jpg").write_text("text")
    with pytest.raises(UsageError, match=r"text.jpg: not a readable photograph"):
        bench_loader([tmp_path], 0, 1, silent)
    with pytest.raises(UsageError, match=r"missing.jpg: not a readable photograph: No such file"):
        bench_loader([tmp_path / "missing.jpg"], 0, 1, silent)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install torchvision"):
        bench_loader([], 0, 1, silent)
