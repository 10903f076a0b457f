"""Intervals and verdicts are those of the textbooks, which scipy.stats computes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from pipelines.analysis.comparison.compare import compare_runs
from pipelines.analysis.comparison.results import Interval, Verdict
from pipelines.analysis.comparison.verdicts import holm, interval, welch
from tests.pipelines.analysis.comparison.run_folders import falling_to, write_run


def known(values: list[float], confidence: float = 0.95) -> Interval:
    """The interval of values that there are."""
    found = interval(values, confidence)
    assert found is not None
    return found


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
@pytest.mark.parametrize("count", [2, 3, 30])
def test_the_interval_of_a_mean_is_students(confidence: float, count: int) -> None:
    values = np.random.default_rng(count).normal(3.0, 0.1, count)
    found = known(values.tolist(), confidence)
    low, high = stats.t.interval(confidence, count - 1, values.mean(), stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-12)
    assert (found.mean, found.std, found.count) == (
        pytest.approx(values.mean()),
        pytest.approx(values.std(ddof=1)),
        count,
    )


@pytest.mark.parametrize("counts", [(2, 2), (3, 5), (10, 2)])
def test_the_test_of_a_pair_is_welchs(counts: tuple[int, int]) -> None:
    noise = np.random.default_rng(sum(counts))
    first, second = noise.normal(3.0, 0.3, counts[0]), noise.normal(3.2, 0.01, counts[1])
    expected = stats.ttest_ind(first, second, equal_var=False)
    difference, p = welch(known(first.tolist()), known(second.tolist()), 0.9)
    assert p == pytest.approx(expected.pvalue, rel=1e-10)
    bounds = expected.confidence_interval(0.9)
    assert (difference.low, difference.high) == pytest.approx((bounds.low, bounds.high), rel=1e-10)
    assert difference.mean == pytest.approx(first.mean() - second.mean())
    assert difference.count == min(counts)


def test_one_value_has_a_mean_and_no_interval() -> None:
    assert interval([], 0.95) is None
    assert interval([3.0], 0.95) == Interval(3.0, None, None, None, 1)
    difference, p = welch(known([3.0]), known([3.5, 3.6]), 0.95)
    assert p is None
    assert (difference.mean, difference.low, difference.count) == (pytest.approx(-0.55), None, 1)


@pytest.mark.parametrize("second", [3.0, 3.3])
def test_seeds_that_all_end_alike_cannot_tell(second: float) -> None:
    """Copies of one run say nothing of chance."""
    difference, p = welch(known([3.0] * 3), known([second] * 3), 0.95)  # a sum of three 3.3 is not quite 9.9
    assert p is None
    assert difference == Interval(3.0 - second, None, None, None, 3)


def test_one_side_that_ends_alike_is_tested_against_the_other() -> None:
    second = [3.1, 3.2, 3.3]
    _, p = welch(known([3.0, 3.0, 3.0]), known(second), 0.95)
    assert p == pytest.approx(stats.ttest_1samp(second, 3.0).pvalue)


def test_holms_correction_by_hand() -> None:
    # Sorted: 0.01 · 4, 0.02 · 3, 0.03 · 2 (not below the one before), 0.5 · 1.
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


FINALS = {
    "asgo": [3.00, 3.01, 3.02],
    "adamw": [3.20, 3.21, 3.23],
    "muon": [3.012, 3.03, 2.99],
    "shampoo": [3.4],
    "adam": [3.3, 3.31, 3.29],
}


def test_verdicts_of_run_folders_are_recomputed(tmp_path: Path) -> None:
    for optimizer, losses in FINALS.items():
        for seed, loss in enumerate(losses):
            write_run(tmp_path / f"{optimizer}-s{seed}", falling_to(loss), optimizer=optimizer, seed=seed)
    comparison = compare_runs([tmp_path], confidence=0.99)
    assert [entry.label for entry in comparison.contenders] == sorted(FINALS, key=lambda name: np.mean(FINALS[name]))
    verdicts = {(verdict.first, verdict.second): verdict for verdict in comparison.verdicts}
    assert len(verdicts) == math.comb(5, 2)
    tested = [pair for pair in verdicts if "shampoo" not in pair]
    raw = [stats.ttest_ind(*(FINALS[name] for name in pair), equal_var=False).pvalue for pair in tested]
    order = np.argsort(raw)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, (len(raw) - rank) * raw[index])
        verdict = verdicts[tested[index]]
        assert verdict.p == pytest.approx(min(1.0, largest), rel=1e-9)
        assert verdict.outcome == ("better" if verdict.p < 0.01 else "cannot tell")
    assert {verdict.outcome for verdict in comparison.verdicts} == {"better", "cannot tell"}
    untested: list[Verdict] = [verdict for pair, verdict in verdicts.items() if "shampoo" in pair]
    assert {(verdict.outcome, verdict.p) for verdict in untested} == {("cannot tell", None)}
    assert verdicts["asgo", "shampoo"].difference == Interval(
        pytest.approx(3.01 - 3.4),
        None,
        None,
        None,
        1,  # type: ignore[arg-type]
    )
    assert "p < 0.01 after Holm's correction" in comparison.rule
