"""Intervals and verdicts are those of the textbooks, which scipy.stats computes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from pipelines.analysis.comparison.compare import compare_runs
from pipelines.analysis.comparison.results import Interval, Verdict
from pipelines.analysis.comparison.t_tests import (
    MOST_SEEDS,
    TTest,
    holm,
    holm_levels,
    interval,
    paired,
    seeds_needed,
    welch,
)
from pipelines.analysis.comparison.verdicts import by_pair
from pipelines.errors import UsageError
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
def test_the_test_of_independent_seeds_is_welchs(counts: tuple[int, int]) -> None:
    noise = np.random.default_rng(sum(counts))
    first, second = noise.normal(3.0, 0.3, counts[0]), noise.normal(3.2, 0.01, counts[1])
    expected = stats.ttest_ind(first, second, equal_var=False)
    test = welch(first.tolist(), second.tolist())
    assert test is not None
    assert (test.name, test.p) == ("Welch", pytest.approx(expected.pvalue, rel=1e-10))
    assert test.bounds(0.9) == pytest.approx(tuple(expected.confidence_interval(0.9)), rel=1e-10)
    assert test.difference == pytest.approx(first.mean() - second.mean())


@pytest.mark.parametrize("count", [2, 3, 20])
def test_the_test_of_shared_seeds_is_paired(count: int) -> None:
    noise = np.random.default_rng(count)
    seeds = noise.normal(3.0, 0.3, count)
    first, second = seeds + noise.normal(0, 0.01, count), seeds + noise.normal(0.02, 0.01, count)
    expected = stats.ttest_rel(first, second)
    test = paired(first.tolist(), second.tolist())
    assert test is not None
    assert (test.name, test.p) == ("paired", pytest.approx(expected.pvalue, rel=1e-9))
    assert test.bounds(0.99) == pytest.approx(tuple(expected.confidence_interval(0.99)), rel=1e-9)
    independent = welch(first.tolist(), second.tolist())
    assert independent is not None
    assert test.error < independent.error / 5  # what the seeds have in common does not count


def test_one_value_has_a_mean_and_no_interval() -> None:
    assert interval([], 0.95) is None
    assert interval([3.0], 0.95) == Interval(3.0, None, None, None, 1)
    assert welch([3.0], [3.5, 3.6]) is None
    assert paired([3.0], [3.5]) is None


@pytest.mark.parametrize("second", [3.0, 3.3])
def test_seeds_that_all_end_alike_cannot_tell(second: float) -> None:
    """Copies of one run say nothing of chance."""
    assert welch([3.0] * 3, [second] * 3) is None  # a sum of three 3.3 is not quite 9.9


def test_differences_that_are_all_equal_but_for_rounding_cannot_tell() -> None:
    values = [3.0, 3.1, 3.2]
    shifted = [value + 0.7 for value in values]
    assert len({b - a for a, b in zip(values, shifted, strict=True)}) > 1
    assert paired(values, shifted) is None
    assert paired(values, values) is None


def test_one_side_that_ends_alike_is_tested_against_the_other() -> None:
    second = [3.1, 3.2, 3.3]
    test = welch([3.0, 3.0, 3.0], second)
    assert test is not None
    assert test.p == pytest.approx(stats.ttest_1samp(second, 3.0).pvalue)


def rejections(test: TTest, count: int, draws: int = 40_000) -> float:
    """The share of simulated experiments with so many seeds in which scipy's test rejects at 5 %."""
    noise = np.random.default_rng(0)
    deviations = np.sqrt(test.variances)
    if test.name == "paired":
        found = stats.ttest_1samp(noise.normal(test.difference, deviations[0], (count, draws)), 0.0)
    else:
        first = noise.normal(test.difference, deviations[0], (count, draws))
        found = stats.ttest_ind(first, noise.normal(0.0, deviations[1], (count, draws)), equal_var=False)
    return float((found.pvalue < 0.05).mean())


@pytest.mark.parametrize(
    "test",
    [
        TTest("paired", -0.02, (0.03**2,), (3,)),
        TTest("paired", 0.1, (0.03**2,), (4,)),
        TTest("Welch", 0.02, (0.02**2, 0.02**2), (3, 3)),
        TTest("Welch", -0.02, (0.01**2, 0.05**2), (3, 5)),
    ],
    ids=["paired", "paired-large", "welch", "welch-unequal"],
)
def test_the_seeds_needed_have_the_power_that_a_simulation_has(test: TTest) -> None:
    needed = seeds_needed(test, 0.05)
    assert 2 < needed <= MOST_SEEDS
    assert rejections(test, needed) > 0.8 - 0.01  # four standard errors, and Welch's approximation
    assert rejections(test, needed - 1) < 0.8 + 0.01


def test_the_seeds_needed_are_those_of_the_noncentral_t_distribution() -> None:
    test, count = TTest("paired", -0.02, (0.03**2,), (3,)), 20
    beyond = stats.t.ppf(0.975, count - 1)
    assert 1 - stats.nct.cdf(beyond, count - 1, 0.02 / 0.03 * np.sqrt(count)) > 0.8
    assert seeds_needed(test, 0.05) == count
    assert seeds_needed(test, 0.01) > count
    assert seeds_needed(TTest("paired", -0.02, (0.3**2,), (3,)), 0.05) == MOST_SEEDS + 1
    assert seeds_needed(TTest("paired", 0.0, (0.3**2,), (3,)), 0.05) == MOST_SEEDS + 1
    assert seeds_needed(TTest("Welch", 9.0, (0.01**2, 0.0), (3, 3)), 0.05) == 2


@pytest.mark.parametrize("seed", range(20))
def test_holms_levels_reject_what_the_corrected_p_values_do(seed: int) -> None:
    ps = (np.random.default_rng(seed).random(8) ** 4).tolist()
    rejected = [p < 0.05 for p in holm(ps)]
    assert [p < level for p, level in zip(ps, holm_levels(ps, 0.05), strict=True)] == rejected
    assert 0 < sum(rejected) < 8 or seed


def test_holms_correction_by_hand() -> None:
    # Sorted: 0.01 · 4, 0.02 · 3, 0.03 · 2 (not below the one before), 0.5 · 1.
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []
    assert holm_levels([0.03, 0.01, 0.5, 0.02], 0.05) == pytest.approx([0.05 / 3, 0.05 / 4, 0.05 / 3, 0.05 / 3])


FINALS = {
    "asgo": [3.00, 3.01, 3.02],
    "adamw": [3.20, 3.21, 3.23],
    "muon": [3.012, 3.03, 2.99],
    "shampoo": [3.4],
    "adam": [3.3, 3.31, 3.29],
}


OTHER_SEEDS = ("adam",)
"""Runs with other seeds than the others, which are paired with each other."""


def write_all(folder: Path) -> None:
    for optimizer, losses in FINALS.items():
        for number, loss in enumerate(losses):
            seed = number + 10 * (optimizer in OTHER_SEEDS)
            write_run(folder / f"{optimizer}-s{seed}", falling_to(loss), optimizer=optimizer, seed=seed)


def expected_of(pair: tuple[str, str]) -> Any:
    """What scipy.stats says of a pair."""
    if {*pair} & {*OTHER_SEEDS}:
        return stats.ttest_ind(*(FINALS[name] for name in pair), equal_var=False)
    return stats.ttest_rel(*(FINALS[name] for name in pair))


def test_verdicts_of_run_folders_are_recomputed(tmp_path: Path) -> None:
    write_all(tmp_path)
    comparison = compare_runs([tmp_path], confidence=0.99)
    assert [entry.label for entry in comparison.contenders] == sorted(FINALS, key=lambda name: np.mean(FINALS[name]))
    verdicts = {(verdict.first, verdict.second): verdict for verdict in comparison.verdicts}
    assert len(verdicts) == math.comb(5, 2)
    tested = [pair for pair in verdicts if "shampoo" not in pair]
    raw = [expected_of(pair).pvalue for pair in tested]
    largest, ended = 0.0, False
    for rank, index in enumerate(np.argsort(raw)):
        pair, remaining = tested[index], len(raw) - rank
        verdict, largest = verdicts[pair], max(largest, remaining * raw[index])
        assert verdict.test == ("Welch" if "adam" in pair else "paired")
        assert verdict.p == pytest.approx(min(1.0, largest), rel=1e-9)
        assert verdict.outcome == ("better" if verdict.p < 0.01 else "cannot tell")
        assert verdict.difference is not None
        bounds = expected_of(pair).confidence_interval(0.99)
        assert (verdict.difference.low, verdict.difference.high) == pytest.approx((bounds.low, bounds.high), rel=1e-9)
        if not ended:
            level = 0.01 / remaining
        ended = ended or verdict.outcome == "cannot tell"
        assert verdict.corrected == pytest.approx(tuple(expected_of(pair).confidence_interval(1 - level)), rel=1e-9)
        assert (verdict.corrected[1] < 0) == (verdict.outcome == "better")
        assert (verdict.seeds_needed is None) == (verdict.outcome == "better")
    assert {verdict.outcome for verdict in comparison.verdicts} == {"better", "cannot tell"}
    untested: list[Verdict] = [verdict for pair, verdict in verdicts.items() if "shampoo" in pair]
    expected = ("cannot tell", None, None, None, None)
    assert {(each.outcome, each.p, each.test, each.corrected, each.seeds_needed) for each in untested} == {expected}
    difference = Interval(pytest.approx(3.01 - 3.4), None, None, None, 1)  # type: ignore[arg-type]
    assert verdicts["asgo", "shampoo"].difference == difference
    assert "p < 0.01 after Holm's correction over all pairs" in comparison.rule


def test_against_one_contender_there_are_fewer_tests_to_correct_for(tmp_path: Path) -> None:
    write_all(tmp_path)
    comparison = compare_runs([tmp_path], against="adamw")
    assert [(verdict.first, verdict.second) for verdict in comparison.verdicts] == [
        (name, "adamw") for name in ("asgo", "muon", "adam", "shampoo")
    ]
    raw = [expected_of((name, "adamw")).pvalue for name in ("asgo", "muon", "adam")]
    assert [verdict.p for verdict in comparison.verdicts[:3]] == pytest.approx(holm(raw))
    assert [verdict.outcome for verdict in comparison.verdicts] == ["better", "better", "worse", "cannot tell"]
    assert "after Holm's correction over the pairs with adamw" in comparison.rule
    everything = compare_runs([tmp_path])
    assert by_pair(everything)["asgo", "adamw"].p > comparison.verdicts[0].p  # type: ignore[operator]


def test_a_contender_is_named_by_its_label_or_its_optimizer(tmp_path: Path) -> None:
    for name, final in (("asgo", 3.0), ("adamw", 3.2)):
        write_run(tmp_path / name, falling_to(final), optimizer=name)
    write_run(tmp_path / "wide", falling_to(3.1), optimizer="asgo", model__d_ff=256)
    write_run(tmp_path / "half", {0: 5.0, 80: 4.0}, optimizer="muon")
    for name in ("adamw", "adamw d_ff=512"):
        reference = compare_runs([tmp_path], against=name).against
        assert reference is not None
        assert reference.label == "adamw d_ff=512"
    for name, message in {
        "asgo": "several contenders have this name or optimizer; choose one of 'asgo d_ff=512', 'asgo d_ff=256'",
        "sgd": "no contender has this name; choose one of 'asgo d_ff=512', 'asgo d_ff=256', 'adamw d_ff=512', 'muon",
        "muon": "none of its runs has finished",
    }.items():
        with pytest.raises(UsageError) as error:
            compare_runs([tmp_path], against=name)
        assert str(error.value).startswith(f"--against {name}: {message}")
    assert len(compare_runs([tmp_path], against="asgo d_ff=256").verdicts) == 2


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "paired"),
        ({"optimizer__weight_decay": 0.05, "schedule__kind": "linear", "training__max_grad_norm": 2.0}, "paired"),
        ({"seeds": (1, 2, 4)}, "Welch"),
        ({"seeds": (1, 2)}, "Welch"),
        ({"seeds": (1, 2, 2), "own_seeds": (1, 2, 2)}, "Welch"),
        ({"model__d_ff": 256}, "Welch"),
        ({"data": "fedcba9876"}, "Welch"),
        ({"data__order": "sequential"}, "Welch"),
        ({"evaluation__batches": 2}, "Welch"),
        ({"training__batch_size": 8}, "Welch"),
        ({"training__steps": 80}, "Welch"),
    ],
)  # fmt: skip
def test_only_runs_that_share_seeds_and_work_are_paired(
    settings: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    settings = dict(settings)
    seeds, own_seeds = settings.pop("seeds", (1, 2, 3)), settings.pop("own_seeds", (3, 1, 2))
    for number, seed in enumerate(own_seeds):
        final = 3.0 + (seed + number / 10) / 10
        write_run(tmp_path / f"asgo{number}", falling_to(final), optimizer="asgo", seed=seed)
    steps = settings.get("training__steps", 160)
    for number, seed in enumerate(seeds):
        val = falling_to(3.0 + seed**2 / 10, steps)
        write_run(tmp_path / f"adamw{number}", val, optimizer="adamw", seed=seed, **settings)
    (verdict,) = compare_runs([tmp_path]).verdicts
    assert verdict.test == expected
    if expected == "paired":  # in the order of the seeds, whatever that of the folders
        assert verdict.p == pytest.approx(stats.ttest_rel([0.11, 0.22, 0.3], [0.1, 0.4, 0.9]).pvalue)
