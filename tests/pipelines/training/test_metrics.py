"""Records survive every form they take, to the last bit."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from pipelines.errors import AsgoError
from pipelines.training.metrics import Row, columns_to_rows, read_lines, rows_to_columns, to_line, to_lines


def rows() -> list[Row]:
    figures = random.Random(0)
    return [
        Row(step=0, tokens=0, samples=0, split="val", epoch=0.0, loss=math.pi, elapsed_s=0.0),
        Row(step=1, tokens=64, samples=4, split="train", epoch=1 / 3, loss=figures.random(), lr=1e-300, grad_norm=1e300,
            step_ms=0.1, optimizer_ms=0.2, throughput=1e7 / 3, elapsed_s=0.1 + 0.2),
        Row(step=2**40, tokens=2**60, samples=2**50, split="val", epoch=5e-324, loss=0.0, accuracy=0.5, elapsed_s=1.0),
    ]  # fmt: skip


def test_lines_and_columns_give_back_the_same_rows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(to_lines(rows()))
    assert read_lines(path) == rows()
    assert columns_to_rows(rows_to_columns(rows())) == rows()


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = to_lines(rows())
    for cut in range(1, len(to_line(rows()[-1]))):
        path.write_bytes(whole[:-cut])
        assert read_lines(path) == rows()[:-1]


@pytest.mark.parametrize("bad", ["{", "[]", "3", '{"step": 1}', '{"step": 1, "split": "val", "tokens": 1, "x": 2}'])
def test_another_bad_line_is_named(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(to_line(rows()[0]) + bad + "\n" + to_line(rows()[1]), encoding="utf-8")
    with pytest.raises(AsgoError, match=r"metrics\.jsonl:2: not a line of metrics"):
        read_lines(path)
