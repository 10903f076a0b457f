"""The figures: what they show is what was compared, and what cannot be drawn is left out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from matplotlib.figure import Figure

from pipelines.analysis.comparison import figures
from pipelines.analysis.comparison.compare import compare_runs
from pipelines.analysis.comparison.figures import MOST_SHOWN, figure_names, shown, write_figures
from pipelines.analysis.comparison.results import Comparison, SettingEffect, Tuning
from pipelines.analysis.comparison.thinning import without_outliers
from pipelines.analysis.figure_style import line_style
from pipelines.tasks.metric import LOSS
from tests.pipelines.analysis.comparison.run_folders import falling_to, write_run

TRAIN = [4.0] * 160


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Two optimizers with two seeds, other learning rates of one, and a diverged and an unfinished run."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        for optimizer, finals in (("asgo", (3.0, 3.1)), ("adamw", (3.19, 3.31))):
            name = f"{optimizer}{seed}"
            write_run(folder / name, falling_to(finals[seed]), TRAIN, optimizer=optimizer, seed=seed)
    write_run(folder / "low", falling_to(3.5), TRAIN, optimizer="asgo", optimizer__lr=1e-4)
    write_run(folder / "high", {0: 5.0, 80: 6.0}, TRAIN[:90], optimizer="asgo", optimizer__lr=0.5)
    write_run(folder / "stopped", {0: 5.0, 80: 3.7}, TRAIN[:40], optimizer="asgo", optimizer__lr=0.1)
    return compare_runs([folder])


def draw(comparison: Comparison) -> dict[str, Figure]:
    """The figures, before they become files."""
    kept: dict[str, Figure] = {}
    with mock.patch.object(figures, "save_figure", lambda figure, path: kept.setdefault(path.stem, figure)):
        write_figures(comparison, Path())
    return kept


@pytest.fixture(scope="module")
def drawn(comparison: Comparison) -> dict[str, Figure]:
    return draw(comparison)


def tuning_of(comparison: Comparison, label: str) -> Tuning:
    """Two trials."""
    runs, best, tokens = comparison.contenders[0].runs, np.array([3.1, 3.0]), np.array([1.0, 2.0])
    return Tuning(label, "asgo", None, runs, 2, is_expected=True, best=best, band=np.stack([best, best]), tokens=tokens)


def test_every_figure_is_written_as_png_and_pdf(comparison: Comparison, tmp_path: Path) -> None:
    effect = SettingEffect("optimizer.beta2", "asgo", (0.8, 0.95), comparison.contenders[:2])
    more = dataclasses.replace(comparison, setting_effects=(effect,), tunings=(tuning_of(comparison, "asgo"),))
    assert write_figures(more, tmp_path) == figure_names(LOSS)
    for name in figure_names(LOSS):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert len(list(tmp_path.iterdir())) == 2 * len(figure_names(LOSS))


@pytest.mark.parametrize(("abscissa", "last"), [("steps", 160), ("tokens", 160 * 2048), ("seconds", 80)])
def test_losses_are_drawn_over_steps_tokens_and_seconds(drawn: dict[str, Figure], abscissa: str, last: float) -> None:
    training, validation = drawn[f"loss-{abscissa}"].axes
    asgo, adamw, target = validation.lines
    np.testing.assert_allclose(asgo.get_xdata(), [0, last / 2, last])
    np.testing.assert_allclose(asgo.get_ydata(), [5.0, (5 + 3.05) / 2, 3.05])
    np.testing.assert_allclose(adamw.get_ydata(), [5.0, (5 + 3.25) / 2, 3.25])
    assert (asgo.get_color(), adamw.get_color()) == (line_style(0)["color"], line_style(1)["color"])
    np.testing.assert_allclose(target.get_ydata(), 3.25)
    band = validation.collections[0].get_paths()[0].vertices
    assert {round(y, 6) for x, y in band if x == last} == {3.0, 3.1}
    assert len(training.lines) == 2


def test_a_diverged_run_is_drawn_beside_the_band(tmp_path: Path) -> None:
    write_run(tmp_path / "good", falling_to(3.0), TRAIN, seed=1)
    write_run(tmp_path / "lost", {0: 5.0, 160: 7.0}, TRAIN, seed=2)
    training, validation = draw(compare_runs([tmp_path]))["loss-steps"].axes
    assert [line.get_ydata()[-1] for line in validation.lines] == [3.0, 7.0]
    assert len(training.lines) == 2


def test_final_losses_show_every_seed_and_the_interval(comparison: Comparison, drawn: dict[str, Figure]) -> None:
    (axes,) = drawn["final-losses"].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [entry.label for entry in shown(comparison)]
    interval, seeds, mean = axes.lines[:3]
    final = comparison.contenders[0].final
    assert final is not None
    assert list(interval.get_xdata()) == [final.low, final.high]
    assert list(seeds.get_xdata()) == [3.0, 3.1]
    assert list(mean.get_xdata()) == [pytest.approx(3.05)]


def test_learning_rates_show_what_diverged_and_what_was_stopped(drawn: dict[str, Figure]) -> None:
    (axes,) = drawn["sensitivity"].axes
    assert axes.get_xscale() == "log"
    (cross,) = [line for line in axes.lines if line.get_marker() == "x"]
    assert list(cross.get_xdata()) == [0.5]
    assert cross.get_ydata()[0] > 0.9  # of the height
    (hollow,) = [line for line in axes.lines if line.get_markerfacecolor() == "none" and len(line.get_xdata())]
    assert (list(hollow.get_xdata()), list(hollow.get_ydata())) == ([0.1], [3.7])


def test_a_learning_rate_with_a_loss_beyond_the_axis_is_marked_on_its_edge(tmp_path: Path) -> None:
    for lr, final in {5e-4: 3.1, 1e-3: 3.0, 2e-3: 3.1, 4e-3: 3.2, 8e-3: 4.9}.items():
        write_run(tmp_path / f"lr{lr}", falling_to(final), TRAIN, optimizer__lr=lr)
    figure = draw(compare_runs([tmp_path]))["sensitivity"]
    (axes,) = figure.axes
    top = axes.get_ylim()[1]
    assert 3.2 < top < 4.9
    (mark,) = [line for line in axes.lines if line.get_marker() == "^"]
    assert (list(mark.get_xdata()), list(mark.get_ydata())) == ([8e-3], [top])
    assert figure.legends[0].get_texts()[-1].get_text() == "beyond the axis"


def test_what_cannot_be_drawn_is_left_out(tmp_path: Path) -> None:
    write_run(tmp_path / "runs/one", falling_to(3.0), TRAIN)
    one = write_figures(compare_runs([tmp_path / "runs"]), tmp_path / "one")
    assert one == ("loss-steps", "loss-tokens", "loss-seconds", "final-losses", "optimizer-cost")
    write_run(tmp_path / "begun/none", {})
    assert write_figures(compare_runs([tmp_path / "begun"]), tmp_path / "none") == ()


def test_a_label_that_looks_like_a_formula_is_drawn_as_it_is(comparison: Comparison, tmp_path: Path) -> None:
    first, *others = comparison.contenders
    named = dataclasses.replace(first, label=r"$\frac$ a_b^c")
    effect = SettingEffect("optimizer.beta2", named.label, (0.8,), (named,))
    tuning = tuning_of(comparison, named.label)
    contenders = (named, *others)
    changed = dataclasses.replace(comparison, contenders=contenders, setting_effects=(effect,), tunings=(tuning,))
    assert write_figures(changed, tmp_path) == figure_names(LOSS)


def test_figures_show_no_more_contenders_than_there_are_lines_to_tell_apart(comparison: Comparison) -> None:
    entry = comparison.contenders[0]
    many = tuple(dataclasses.replace(entry, label=str(index)) for index in range(100))
    kept = shown(dataclasses.replace(comparison, contenders=many))
    assert [entry.label for entry in kept] == [str(index) for index in range(MOST_SHOWN)]
    assert len({tuple(line_style(index).items()) for index in range(MOST_SHOWN)}) == MOST_SHOWN


def test_one_far_off_does_not_press_the_others_into_a_line() -> None:
    assert without_outliers(3.0, [3.0, 3.1, 3.1, 3.2, 9.0]) == 3.2
    assert without_outliers(3.0, [3.0, 9.0]) == 9.0
    assert without_outliers(3.0, [3.0]) == 3.0


def test_the_target_is_in_the_legend(comparison: Comparison, drawn: dict[str, Figure]) -> None:
    assert comparison.target is not None
    for name in ("loss-steps", "final-losses"):
        (legend,) = drawn[name].legends
        assert f"target, {comparison.target.value:.4f}" in [text.get_text() for text in legend.get_texts()]
