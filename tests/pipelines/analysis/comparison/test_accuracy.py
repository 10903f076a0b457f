"""Runs on images are compared by accuracy: everywhere, higher is better."""

from __future__ import annotations

import csv
import html
import io
import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import stats

from pipelines.analysis.comparison import figures
from pipelines.analysis.comparison.compare import compare_runs
from pipelines.analysis.comparison.figures import figure_names, write_figures
from pipelines.analysis.comparison.headline import headline
from pipelines.analysis.comparison.report import render_page, summary
from pipelines.analysis.comparison.results import Comparison, Target
from pipelines.analysis.comparison.tables import make_tables
from pipelines.analysis.comparison.verdicts import by_pair
from pipelines.errors import UsageError
from pipelines.tasks.metric import ACCURACY, LOSS
from tests.pipelines.analysis.comparison.run_folders import falling_to, write_run

FINALS = {"asgo": (0.91, 0.92, 0.94), "muon": (0.88, 0.93, 0.85), "adamw": (0.8, 0.81, 0.83)}
STEPS = 160


def write(path: Path, final: float, seed: int = 0, **settings: object) -> None:
    """A run that ends at this accuracy. Its loss is the higher, the higher the accuracy: the order is the opposite."""
    accuracy = {0: 0.001, 80: final + 0.02, STEPS: final}
    losses = {0: 7.0, 80: 4.0, STEPS: 1.0 + final}
    settings = {"training__steps": STEPS, "seed": seed, **settings}
    write_run(path, losses, [2.0] * STEPS, task="images", accuracy=accuracy, **settings)  # type: ignore[arg-type]


def write_all(folder: Path) -> None:
    """Three contenders with three seeds each; the seeds differ between contenders, so Welch's test applies."""
    for number, (optimizer, finals) in enumerate(FINALS.items()):
        for seed, final in enumerate(finals):
            write(folder / f"{optimizer}-s{seed}", final, seed + 10 * number, optimizer=optimizer)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """The contenders, worse learning rates of one, and a diverged and an unfinished run."""
    folder = tmp_path_factory.mktemp("runs")
    write_all(folder)
    write(folder / "low", 0.6, optimizer="asgo", optimizer__lr=1e-5)
    images = {"task": "images", "optimizer": "asgo", "training__steps": STEPS}
    lost = {**images, "optimizer__lr": 0.5, "accuracy": {0: 0.001}}
    write_run(folder / "lost", {0: 7.0, 80: 8.0}, [8.0] * 90, **lost)  # type: ignore[arg-type]
    stopped = {**images, "optimizer__lr": 0.1, "accuracy": {0: 0.001, 40: 0.5, 80: 0.4}}
    write_run(folder / "stopped", {0: 7.0, 40: 5.0, 80: 5.2}, [5.0] * 80, **stopped)  # type: ignore[arg-type]
    return compare_runs([folder])


def test_a_value_is_written_as_its_metric_is() -> None:
    assert (LOSS.text(3.28), LOSS.difference(-0.0213, "+"), LOSS.difference_unit) == ("3.2800", "-0.0213", "")
    assert (ACCURACY.text(0.91234), ACCURACY.difference(0.0213, "+")) == ("91.23%", "+2.13")
    assert (ACCURACY.difference_unit, ACCURACY.text(None), ACCURACY.text_beside(0.5)) == (" points", "", "50.0%")
    assert (LOSS.best([3.0, 2.0]), ACCURACY.best([0.3, 0.2]), ACCURACY.best([])) == (2.0, 0.3, None)
    assert [LOSS.other, ACCURACY.other] == [ACCURACY, LOSS]


def test_contenders_are_ordered_by_accuracy_and_by_loss_where_asked(comparison: Comparison, tmp_path: Path) -> None:
    assert comparison.metric is ACCURACY
    assert [entry.optimizer for entry in comparison.contenders] == list(FINALS)
    assert comparison.contenders[0].final is not None
    assert comparison.contenders[0].final.mean == pytest.approx(np.mean(FINALS["asgo"]))
    assert comparison.entries[-1].label == "asgo lr=0.5"
    write_all(tmp_path)
    by_loss = compare_runs([tmp_path], metric_name="loss")
    assert [entry.label for entry in by_loss.contenders] == [*FINALS][::-1]
    assert headline(by_loss).startswith("adamw ends lowest, at 1.8133, ")


def test_the_target_is_reached_at_or_above_it(tmp_path: Path) -> None:
    accuracy = {0: 0.1, 40: 0.85, 80: 0.9, 120: 0.88, 160: 0.95}
    losses = {step: 7.0 - step / 100 for step in accuracy}
    write_run(tmp_path / "1", losses, task="images", training__steps=STEPS, accuracy=accuracy)
    for target, step in ((0.9, 80), (0.85, 40), (0.901, 160), (0.96, None)):
        reach = compare_runs([tmp_path], target).entries[0].reach
        assert reach is not None
        assert reach.steps == (step,)
    with pytest.raises(UsageError, match=r"the target must be a fraction between 0 and 1, not 90; 0\.9 is 90 %"):
        compare_runs([tmp_path], 90)


def test_the_default_target_is_the_reference_or_the_lowest_accuracy(comparison: Comparison, tmp_path: Path) -> None:
    assert comparison.target == Target(pytest.approx(np.mean(FINALS["adamw"])), "adamw's final accuracy")
    write(tmp_path / "asgo", 0.9, optimizer="asgo")
    write(tmp_path / "muon", 0.8, optimizer="muon")
    assert compare_runs([tmp_path]).target == Target(0.8, "muon's final accuracy")


def test_higher_is_better_in_verdicts_and_in_the_headline(comparison: Comparison) -> None:
    found = by_pair(comparison)["asgo lr=0.002", "adamw"]
    expected = stats.ttest_ind(FINALS["asgo"], FINALS["adamw"], equal_var=False)
    bounds = expected.confidence_interval()
    assert found.difference is not None
    assert (found.difference.low, found.difference.high) == pytest.approx((bounds.low, bounds.high))
    assert (found.outcome, found.difference.mean > 0) == ("better", True)
    assert by_pair(comparison)["adamw", "asgo lr=0.002"].outcome == "worse"
    asgo, muon = FINALS["asgo"], FINALS["muon"]
    low, high = stats.ttest_ind(asgo, muon, equal_var=False).confidence_interval()
    margin = np.mean(asgo) - np.mean(muon)
    assert headline(comparison) == (
        f"asgo lr=0.002 ends highest, at {np.mean(asgo):.2%}, {100 * margin:.2f} points (95% interval {100 * low:.2f} "
        f"to {100 * high:.2f}) above muon, the next; whether it is truly better is uncertain. "
        "1 of 2 others is certainly worse."
    )


def test_columns_are_named_by_what_they_hold(comparison: Comparison) -> None:
    tables = {table.name: table for table in make_tables(comparison)}
    for table in tables.values():
        heads = table.csv().splitlines()[0].split(",")
        assert not [head for head in heads if "loss" in head and head != "loss"], table.name
    first = tables["entries"].records[0]
    assert first["final_accuracy"] == pytest.approx(np.mean(FINALS["asgo"]))
    assert (first["best_accuracy"], first["loss"]) == (0.96, pytest.approx(1 + np.mean(FINALS["asgo"])))
    assert tables["entries"].heads[2:6] == ("diverged", "final accuracy", "best accuracy", "training accuracy")
    curve = next(csv.DictReader(io.StringIO(tables["curves"].csv())))
    assert (float(curve["val_accuracy"]), "train_accuracy" in curve) == (0.001, True)
    half = stats.ttest_ind(FINALS["asgo"], FINALS["adamw"], equal_var=False).confidence_interval()
    margin = f"{100 * np.mean(half):+.2f} ± {50 * (half.high - half.low):.2f} points"
    assert margin in [row[3] for row in tables["verdicts"].texts]
    (stopped,) = [record for record in tables["sensitivity"].records if record["unfinished"]]
    assert stopped["best_accuracy_unfinished"] == 0.5
    assert summary(comparison)["target"]["accuracy"] == pytest.approx(np.mean(FINALS["adamw"]))


def test_the_page_speaks_of_accuracy(comparison: Comparison) -> None:
    page = render_page(comparison, dict.fromkeys(figure_names(ACCURACY), b""), [], [])
    words = " ".join(html.unescape(page[: page.index('id="curve-data"')]).split())
    for expected in ("--metric loss", 'scope="col">loss', "validation loss 8 at step 80"):  # why a run diverged
        assert expected in words
        words = words.replace(expected, "")
    assert "loss" not in words
    assert "compared by top-1 accuracy, unless <code></code> is given" in words
    assert "Green: the row ends higher, for certain. Red: lower, for certain." in words
    assert "Crosses at the lower edge: diverged runs." in words
    script = page[page.rindex("<script>") :]
    assert script.count("accuracy") == 3
    assert " loss <b>" not in script
    assert "[-high - margin, margin - low]" in script


@pytest.fixture(scope="module")
def drawn(comparison: Comparison) -> dict[str, Figure]:
    kept: dict[str, Figure] = {}
    with mock.patch.object(figures, "save_figure", lambda figure, path: kept.setdefault(path.stem, figure)):
        write_figures(comparison, Path())
    return kept


def test_figures_show_percentages_and_have_names_of_their_own(drawn: dict[str, Figure]) -> None:
    assert {"accuracy-steps", "accuracy-tokens", "accuracy-seconds", "final-accuracies"} < drawn.keys()
    training, validation = drawn["accuracy-steps"].axes
    assert training.get_ylabel() == "accuracy"
    (finals,) = drawn["final-accuracies"].axes
    assert finals.get_xlabel() == "final validation accuracy"
    for axis in (validation.yaxis, finals.xaxis):
        assert axis.get_major_formatter()(0.5).startswith("50")
        assert axis.get_major_formatter()(0.5).endswith("%")
    low, high = validation.get_ylim()
    assert 0.7 < low < 0.81 < 0.94 < high  # without the beginning


def test_a_diverged_run_is_marked_where_accuracies_are_low(drawn: dict[str, Figure]) -> None:
    (axes,) = drawn["sensitivity"].axes
    (cross,) = [line for line in axes.lines if line.get_marker() == "x"]
    assert cross.get_ydata()[0] < 0.1  # of the height
    low, high = axes.get_ylim()
    assert 0.89 < low < 0.91 < 0.94 < high < 1  # without outliers
    (hollow,) = [line for line in axes.lines if line.get_markerfacecolor() == "none" and len(line.get_xdata())]
    assert list(hollow.get_ydata()) == [0.5]


def test_one_far_below_does_not_press_the_others_into_a_line(tmp_path: Path) -> None:
    for optimizer, final in (("asgo", 0.9), ("muon", 0.89), ("adam", 0.88), ("adamw", 0.87), ("asro", 0.1)):
        write(tmp_path / optimizer, final, optimizer=optimizer)
    kept: dict[str, Figure] = {}
    with mock.patch.object(figures, "save_figure", lambda figure, path: kept.setdefault(path.stem, figure)):
        write_figures(compare_runs([tmp_path]), Path())
    (axes,) = kept["final-accuracies"].axes
    assert 0.8 < axes.get_xlim()[0] < 0.87
    (text,) = axes.texts
    assert (text.get_text(), text.xy[0]) == ("10.00%", 0.01)


def test_warnings_speak_of_accuracy(comparison: Comparison, tmp_path: Path) -> None:
    for number, lr in enumerate((0.001, 0.01, 0.1)):
        write(tmp_path / str(lr), 0.5 + number / 10, optimizer="asgo", optimizer__lr=lr)
    cautions = "\n".join((*comparison.cautions, *compare_runs([tmp_path]).cautions))
    assert "Diverged, so without a final accuracy: lost." in cautions
    assert "Stopped before the learning rate had decayed, which brings accuracies up: stopped." in cautions
    assert "its final accuracy, which is therefore slightly too high." in cautions
    assert "asgo: the best learning rate, 0.1, is the highest of those tried" in cautions
    assert "loss" not in cautions


def test_a_metric_that_the_runs_do_not_have_is_one_line(tmp_path: Path) -> None:
    write_run(tmp_path / "text", falling_to(3.0))
    assert compare_runs([tmp_path]).metric is LOSS
    with pytest.raises(UsageError, match=r"^--metric accuracy: the task gpt records no accuracy; choose loss$"):
        compare_runs([tmp_path], metric_name="accuracy")
    write(tmp_path / "images/run", 0.9)
    with pytest.raises(UsageError, match=r"^--metric speed: the task .* records no speed; choose accuracy or loss$"):
        compare_runs([tmp_path / "images"], metric_name="speed")


def test_evidence_rules_are_about_losses(tmp_path: Path) -> None:
    write(tmp_path / "run", 0.9)
    assert compare_runs([tmp_path], evidence_rule="track3").metric is LOSS
    with pytest.raises(UsageError, match=r"^--rule is about losses: leave out --metric accuracy$"):
        compare_runs([tmp_path], evidence_rule="track3", metric_name="accuracy")


def test_the_summary_is_strict_json(comparison: Comparison) -> None:
    assert json.loads(json.dumps(summary(comparison), allow_nan=False))["entries"][0]["optimizer"] == "asgo"
