"""What one number in the settings did: found among the contenders, in the table, in the figure."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from pipelines.analysis.comparison.compare import compare_runs
from pipelines.analysis.comparison.figures import draw_setting_effects
from pipelines.analysis.comparison.results import Comparison
from pipelines.analysis.comparison.tables import make_tables
from tests.pipelines.analysis.comparison.run_folders import falling_to, write_run

TRAIN = [4.0] * 160
# Final losses by increment and decrement; 0.05 and 2e-4 are the preset's.
FINALS = {(0.01, 2e-4): (3.2, 3.22), (0.05, 2e-4): (3.0, 3.01), (0.1, 2e-4): (3.1, 3.3), (0.05, 0.0): (3.4, 3.41)}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """AccAsro with three increments and two decrements, one run of which diverged, and AdamW, which has neither."""
    folder = tmp_path_factory.mktemp("runs")

    def write(name: str, final: float, **settings: object) -> None:
        write_run(folder / name, falling_to(final), TRAIN, **settings)

    for (increment, decrement), finals in FINALS.items():
        for seed, final in enumerate(finals):
            chosen = {"optimizer__increment": increment, "optimizer__decrement": decrement}
            write(f"{increment}-{decrement}-{seed}", final, optimizer="accasro", seed=seed, **chosen)
    write("lost", 6.0, optimizer="accasro", seed=2, optimizer__increment=0.1)
    write("worse-rate", 3.9, optimizer="accasro", optimizer__increment=0.01, optimizer__lr=1e-5)
    write("adamw", 3.5, optimizer="adamw")
    return compare_runs([folder])


def test_each_number_is_varied_alone(comparison: Comparison) -> None:
    increment, decrement = comparison.setting_effects
    assert (increment.setting, increment.values) == ("optimizer.increment", (0.01, 0.05, 0.1))
    assert increment.label == "accasro decrement=0.0002"
    assert (decrement.setting, decrement.values) == ("optimizer.decrement", (0.0, 2e-4))
    assert decrement.label == "accasro increment=0.05"
    assert increment.entries[1] is decrement.entries[1]
    assert all(entry in comparison.contenders for entry in increment.entries)  # the worse learning rate is none


def test_the_table_has_means_and_intervals(comparison: Comparison) -> None:
    (table,) = [table for table in make_tables(comparison) if table.name == "settings"]
    assert [record["value"] for record in table.records] == [0.01, 0.05, 0.1, 0.0, 2e-4]
    first, third = table.records[0], table.records[2]
    low, high = stats.t.interval(0.95, 1, 3.21, stats.sem((3.2, 3.22)))
    assert first["final_loss"] == pytest.approx(3.21)
    assert (first["final_loss_low"], first["final_loss_high"]) == (pytest.approx(low), pytest.approx(high))
    assert (third["finished"], third["diverged"], third["runs"]) == (2, 1, 3)
    assert table.texts[2][:5] == ("optimizer.increment", "accasro decrement=0.0002", "0.1", "0.001", "2 of 3")


def test_the_figure_has_a_panel_for_each_number_with_every_seed(comparison: Comparison) -> None:
    figure = draw_setting_effects(comparison)
    assert figure is not None
    increment, decrement = figure.axes
    assert [axes.get_xlabel() for axes in figure.axes] == ["optimizer.increment", "optimizer.decrement"]
    assert [label.get_text() for label in increment.get_xticklabels()] == ["0.01", "0.05", "0.1"]
    assert [label.get_text() for label in decrement.get_xticklabels()] == ["0", "0.0002"]
    np.testing.assert_allclose(increment.lines[0].get_ydata(), [3.21, 3.005, 3.2])
    seeds = [line for line in increment.lines if line.get_marker() == "o"]
    assert [list(line.get_ydata()) for line in seeds] == [[3.2, 3.22], [3.0, 3.01], [3.1, 3.3]]
    (cross,) = [line for line in increment.lines if line.get_marker() == "x"]
    assert list(cross.get_xdata()) == [2]


def test_a_long_label_leaves_the_panels_their_width(comparison: Comparison) -> None:
    effects = tuple(dataclasses.replace(each, label="asgo " + "beta2=0.8 " * 9) for each in comparison.setting_effects)
    figure = draw_setting_effects(dataclasses.replace(comparison, setting_effects=effects))
    assert figure is not None
    figure.draw_without_rendering()
    assert all(axes.get_position().width > 0.38 for axes in figure.axes)


def test_runs_that_differ_in_no_number_have_no_such_figure(tmp_path: Path) -> None:
    write_run(tmp_path / "a", falling_to(3.0), optimizer="asgo")
    write_run(tmp_path / "b", falling_to(3.1), optimizer="asgo", optimizer__by_heads=True)
    write_run(tmp_path / "c", falling_to(3.2), optimizer="adamw")
    comparison = compare_runs([tmp_path])
    assert comparison.setting_effects == ()
    assert draw_setting_effects(comparison) is None
