"""Layer statistics in the report of a comparison, from runs that were really trained."""

from __future__ import annotations

import base64
import csv
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.analysis.comparison import report
from pipelines.analysis.comparison.compare import compare_runs
from pipelines.analysis.comparison.figures import write_layers
from pipelines.analysis.comparison.report import write_report
from pipelines.config import RunConfig
from pipelines.errors import UsageError
from pipelines.training.shadow_file import shadow_file
from pipelines.training.statistics_file import read_statistics
from pipelines.training.train import train
from tests.conftest import SilentReporter


def test_each_contender_that_recorded_its_layers_shows_them(
    small_config: Callable[..., RunConfig], tmp_path: Path, reporter: SilentReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "write_figures", lambda *_: ())  # the other figures take seconds
    accasro = {"optimizer__name": "accasro", "statistics__every": 2}
    train(small_config(**accasro), tmp_path / "runs" / "accasro", reporter)
    train(small_config(**accasro, seed=43), tmp_path / "runs" / "accasro-43", reporter)
    train(small_config(optimizer__name="adamw"), tmp_path / "runs" / "adamw", reporter)
    page = write_report(compare_runs([tmp_path / "runs"]), tmp_path / "report", "asgo compare runs")
    layers = tmp_path / "report" / "figures" / "layers"
    assert sorted(path.relative_to(layers).as_posix() for path in layers.rglob("*.*")) == sorted(
        [
            "accasro/layer-statistics.csv",
            *(f"accasro/layer-{name}.{suffix}" for name in ("norms", "scales", "updates") for suffix in ("pdf", "png")),
        ]
    )
    with (layers / "accasro/layer-statistics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    recorded = read_statistics(tmp_path / "runs/accasro/statistics.jsonl")
    assert recorded is not None
    assert len(rows) == len(recorded.records) * len(recorded.header["shapes"])
    last = recorded.records[-1]["layers"][rows[-1]["layer"]]
    assert float(rows[-1]["scale.mean"]) == last["scale"]["mean"]
    assert [int(rows[-1][f"scale.histogram.{place}"]) for place in range(21)] == last["scale"]["histogram"]
    content = page.read_text(encoding="utf-8")
    assert "What happened in the layers" in content
    for image in layers.rglob("*.png"):
        assert base64.b64encode(image.read_bytes()).decode() in content

    write_report(compare_runs([tmp_path / "runs" / "adamw"]), tmp_path / "report", "asgo compare")
    assert not layers.exists(), "an earlier report is replaced as a whole"
    assert "What happened in the layers" not in page.read_text(encoding="utf-8")
    layers.mkdir(parents=True)
    (layers / "mine.txt").write_text("not a figure")
    with pytest.raises(UsageError, match=r"contains figures/layers/mine.txt beside a report"):
        write_report(compare_runs([tmp_path / "runs"]), tmp_path / "report", "asgo compare")


def test_the_run_with_most_measurements_is_drawn(
    small_config: Callable[..., RunConfig], tmp_path: Path, reporter: SilentReporter
) -> None:
    """The layers of one seed do not hide the shadow optimizers of another."""
    both: list[dict[str, Any]] = [{}, {"shadows.optimizers.muon.optimizer.name": "muon", "shadows.every": 6}]
    for seed, shadows in enumerate(both, 1):
        config = small_config(optimizer__name="adamw", statistics__every=6, seed=seed, **shadows)
        train(config, tmp_path / "runs" / f"adamw-{seed}", reporter)
    (entry,) = compare_runs([tmp_path / "runs"]).entries
    (drawn,) = write_layers([entry], tmp_path / "figures")
    assert drawn.run == "adamw-2"
    assert len(drawn.images) == 5
    assert [table.name for table in drawn.tables] == ["layer-statistics", "shadow-steps"]


def test_a_report_with_shadows_has_their_values_and_can_be_replaced(
    small_config: Callable[..., RunConfig], tmp_path: Path, reporter: SilentReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "write_figures", lambda *_: ())
    shadows: dict[str, Any] = {"shadows.optimizers.muon.optimizer.name": "muon", "shadows.every": 2}
    train(small_config(optimizer__name="adamw", **shadows), tmp_path / "runs" / "adamw", reporter)
    for _ in range(2):
        page = write_report(compare_runs([tmp_path / "runs"]), tmp_path / "report", "asgo compare runs")
    assert "<td>muon</td>" in page.read_text(encoding="utf-8")
    folder = tmp_path / "report/figures/layers/adamw"
    found = shadow_file(tmp_path / "runs" / "adamw").read()
    assert found is not None
    with (folder / "shadow-steps.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["direction"] == "muon"]
    whole = [row for row in rows if not row["layer"]]
    assert [float(row["cosine"]) for row in whole] == [r["directions"]["muon"]["cosine"] for r in found.records]
    assert [float(row["held_out.at_lengths.2"]) for row in whole] == [
        record["directions"]["muon"]["held_out"]["at_lengths"][2] for record in found.records
    ]
    assert {row["step"] for row in rows if row["singular_values.0"]} == {whole[-1]["step"]}
    muon = [record["directions"]["muon"] for record in found.records[len(found.records) // 2 :]]
    cosine = statistics.median(each["cosine"] or 0.0 for each in muon)
    own = statistics.median(each["held_out"]["own"] for each in muon)
    line = next(line for line in (folder / "shadow-steps.md").read_text().splitlines() if line.startswith("| muon"))
    assert f"| {cosine:.2f} |" in line
    assert line.endswith(f"| {own:+.5f} |")
