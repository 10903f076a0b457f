"""The figure of differences shows what the verdicts say."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from pipelines.analysis.comparison.compare import compare_runs
from pipelines.analysis.comparison.difference_figure import MOST_PAIRS, draw_differences
from pipelines.analysis.comparison.results import Comparison
from tests.pipelines.analysis.comparison.run_folders import falling_to, write_run

FINALS = {"asgo": (3.0, 3.01, 3.03), "muon": (3.02, 3.0, 3.04), "adamw": (3.1, 3.12, 3.12), "adam": (3.2,)}


def compared(folder: Path, finals: Mapping[str, Sequence[float]]) -> Comparison:
    for optimizer, losses in finals.items():
        for seed, final in enumerate(losses):
            write_run(folder / f"{optimizer}{seed}", falling_to(final), optimizer=optimizer, seed=seed)
    return compare_runs([folder])


def axes_of(comparison: Comparison) -> Axes:
    figure = draw_differences(comparison)
    assert figure is not None
    (axes,) = figure.axes
    return axes


def labels_below(axes: Axes) -> list[str]:
    figure = axes.get_figure()
    assert figure is not None
    return [text.get_text() for text in figure.legends[0].get_texts()]


def in_row(axes: Axes, row: int) -> list[Line2D]:
    return [line for line in axes.lines if list(line.get_ydata()) in ([row], [row, row])]


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return compared(tmp_path_factory.mktemp("runs"), FINALS)


def test_each_pair_has_a_line_with_its_corrected_interval(comparison: Comparison) -> None:
    axes = axes_of(comparison)
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == [f"{verdict.first} − {verdict.second}" for verdict in comparison.verdicts]
    assert axes.get_xlabel() == "final validation loss\nfirst minus second; left of 0, the first is better"
    assert list(axes.lines[0].get_xdata()) == [0.0, 0.0]
    low, high = axes.get_xlim()
    assert low < 0 < high
    for row, verdict in enumerate(comparison.verdicts):
        assert verdict.difference is not None
        interval, mean = in_row(axes, row)
        expected = verdict.corrected or (verdict.difference.mean,) * 2
        assert tuple(interval.get_xdata()) == pytest.approx(expected)
        assert list(mean.get_xdata()) == [verdict.difference.mean]
        assert (mean.get_markerfacecolor() == "white") == (verdict.outcome == "cannot tell")
    assert {verdict.outcome for verdict in comparison.verdicts} == {"better", "cannot tell"}
    assert labels_below(axes) == ["certain; 95% interval, corrected", "not certain"]


def test_an_interval_that_excludes_0_is_one_of_a_certain_difference(comparison: Comparison) -> None:
    tested = [verdict for verdict in comparison.verdicts if verdict.corrected is not None]
    assert len(tested) == 3
    for verdict in tested:
        assert verdict.corrected is not None
        low, high = verdict.corrected
        assert (high < 0 or low > 0) == (verdict.outcome != "cannot tell")


def test_a_pair_far_off_does_not_press_the_others_into_a_line(tmp_path: Path) -> None:
    axes = axes_of(compared(tmp_path, {**FINALS, "shampoo": (4.9, 4.91, 4.94)}))
    low, _ = axes.get_xlim()
    assert -0.5 < low < -0.1
    assert [text.get_text() for text in axes.texts] == ["-1.9033", "-1.8967", "-1.8033", "-1.7167"]
    arrows = [line for line in axes.lines if line.get_marker() == "<"]
    assert [line.get_xdata()[0] for line in arrows] == [low] * 4
    assert labels_below(axes) == ["certain; 95% interval, corrected", "not certain", "beyond the axis"]


def test_of_many_pairs_those_with_the_best_are_drawn(comparison: Comparison) -> None:
    first = comparison.verdicts[0]
    pairs = itertools.combinations(map(str, range(10)), 2)
    many = tuple(dataclasses.replace(first, first=one, second=other) for one, other in pairs)
    assert len(many) > MOST_PAIRS
    labels = [label.get_text() for label in axes_of(dataclasses.replace(comparison, verdicts=many)).get_yticklabels()]
    assert labels == [f"0 − {other}" for other in range(1, 10)]
    against = dataclasses.replace(comparison, verdicts=many, against=comparison.contenders[0])
    assert len(axes_of(against).get_yticks()) == MOST_PAIRS


def test_without_a_test_there_is_no_figure(tmp_path: Path) -> None:
    assert draw_differences(compared(tmp_path, {"asgo": (3.0,), "adamw": (3.1,)})) is None
    assert draw_differences(compare_runs([tmp_path / "asgo0"])) is None


def test_differences_of_accuracies_are_in_percentage_points(tmp_path: Path) -> None:
    for optimizer, finals in {"asgo": (0.9, 0.92), "adamw": (0.8, 0.83)}.items():
        for seed, final in enumerate(finals):
            settings = {"task": "images", "optimizer": optimizer, "training__steps": 160, "seed": seed}
            write_run(tmp_path / f"{optimizer}{seed}", falling_to(3.0), accuracy={0: 0.1, 160: final}, **settings)  # type: ignore[arg-type]
    axes = axes_of(compare_runs([tmp_path]))
    assert axes.get_xlabel().startswith("final validation accuracy, percentage points\n")
    assert axes.get_xlabel().endswith("right of 0, the first is better")
    assert axes.xaxis.get_major_formatter()(0.05) == "5"
