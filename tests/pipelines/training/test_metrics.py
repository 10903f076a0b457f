"""Records survive every form they take, to the last bit."""

from __future__ import annotations

import csv
import io
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.analysis.export import records, write_csv
from pipelines.config import RunConfig
from pipelines.errors import AsgoError
from pipelines.training.gpt_task import GPTTask
from pipelines.training.metrics import Row, columns_to_rows, read_lines, rows_to_columns, to_line, to_lines
from pipelines.training.reporter import Reporter
from pipelines.training.train import train


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


def test_a_column_that_is_added_to_row_survives_a_resume_and_reaches_the_csv_and_the_trackers(
    small_config: Callable[..., RunConfig], tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a line in `Row` does: nothing else is told of the columns.
    monkeypatch.setitem(Row.__annotations__, "perplexity", float)
    monkeypatch.setitem(Row.__annotations__, "skipped_steps", int)
    measured = {"perplexity": 1 / 3, "skipped_steps": 2**60 + 1}
    monkeypatch.setattr(GPTTask, "training_metrics", lambda self, counts: measured)
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    config = small_config(runtime__track=["tensorboard"])
    train(config, run, reporter)
    shutil.rmtree(run / "checkpoints/step-00000006")
    (run / "metrics.jsonl").write_bytes(b"")  # what follows is from the checkpoint at step 4
    rows = train(config, run, reporter, resume=True)

    trained = [row for row in rows if row["split"] == "train"]
    assert [row["step"] for row in trained] == [1, 2, 3, 4, 5, 6]
    assert all(measured.items() <= row.items() for row in trained)
    assert not any(measured.keys() & row.keys() for row in rows if row["split"] == "val")
    assert read_lines(run / "metrics.jsonl") == rows

    for source in (run, run / "checkpoints/step-00000006"):
        text = io.StringIO()
        write_csv(records(source).rows, text)
        header, *lines = csv.reader(io.StringIO(text.getvalue()))
        assert header[-3:] == ["top5_accuracy", "perplexity", "skipped_steps"]
        assert [line[-2:] for line in lines if line[6] == "train"] == [[repr(1 / 3), str(2**60 + 1)]] * 6

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    for name, value in measured.items():
        shown = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert shown == [(step, pytest.approx(value)) for step in range(1, 7)]
