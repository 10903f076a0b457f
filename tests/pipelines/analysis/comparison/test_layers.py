"""Layer statistics in the report of a comparison, from runs that were really trained."""

from __future__ import annotations

import base64
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
    assert sorted(path.relative_to(layers).as_posix() for path in layers.rglob("*.*")) == [
        f"accasro/layer-{name}.{suffix}" for name in ("norms", "scales", "updates") for suffix in ("pdf", "png")
    ]
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
