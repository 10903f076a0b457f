"""The sequential test: its arithmetic by scipy, and its error rate by simulation."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scipy import stats

from pipelines.analysis.comparison.sequential import Looks, SequentialTest, sequential_test
from pipelines.sweeps.until_certain import standing_of
from tests.pipelines.sweeps.test_until_certain import plan_of

SCRIPT = Path(__file__).parents[4] / "docs" / "measure_sequential.py"
LOOKS = Looks(3, (1, 2, 3, 4, 5, 6, 7, 8))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("measure_sequential", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for its dataclasses
    spec.loader.exec_module(module)
    return module


def by_seed(values: Any) -> dict[int, float | None]:
    return {seed: float(value) for seed, value in enumerate(values, start=1)}


def known(test: SequentialTest | None) -> SequentialTest:
    assert test is not None
    return test


@pytest.mark.parametrize(("first", "last"), [(2, 2), (3, 8), (5, 100)])
def test_the_looks_spend_the_whole_error_rate_and_no_more(first: int, last: int) -> None:
    looks = Looks(first, tuple(range(last)))
    shares = [looks.share(count) for count in range(first, last + 1)]
    assert sum(shares) == pytest.approx(1, rel=1e-12)
    assert min(shares) > 0


def test_the_shares_of_eight_seeds_by_hand() -> None:
    # 27, 64, 125, 216, 343, 512 of 512 are spent after 3, ..., 8 seeds.
    assert [LOOKS.share(count) * 512 for count in range(3, 9)] == pytest.approx([27, 37, 61, 91, 127, 169])


@pytest.mark.parametrize("seed", range(10))
def test_p_is_the_smallest_quotient_of_scipys_paired_p_and_the_looks_share(seed: int) -> None:
    chance = np.random.default_rng(seed)
    count = 3 + seed % 6
    first, second = chance.normal(3.0, 0.3, count), chance.normal(3.1, 0.1, count)
    test = known(sequential_test(LOOKS, by_seed(first), by_seed(second)))
    each = [stats.ttest_rel(first[:n], second[:n]).pvalue / LOOKS.share(n) for n in range(3, count + 1)]
    assert test.p == pytest.approx(min(1.0, *each), rel=1e-9)
    assert len(test.looks) == count - 2
    for level in (0.9, min(0.99, test.p * 1.001), test.p * 0.999):
        share, shown = test.at_level(level)
        low, high = shown.bounds(1 - share * level)
        assert (low > 0 or high < 0) == (test.p < level)
        if test.p >= level:
            assert shown.counts == (count,)


def test_a_look_waits_for_every_seed_before_it() -> None:
    first, second = by_seed([3.0, 3.1, 3.0, 3.2, 3.1]), by_seed([3.4, 3.6, 3.5, 3.5, 3.6])
    expected = known(sequential_test(LOOKS, by_seed([3.0, 3.1, 3.0]), second)).looks
    del first[4]
    assert known(sequential_test(LOOKS, first, second)).looks == expected
    assert sequential_test(LOOKS, first, {1: 3.4, 3: 3.5}) is None
    assert sequential_test(LOOKS, {}, second) is None


def test_a_seed_with_a_diverged_run_is_left_out_of_the_tests() -> None:
    first, second = by_seed([3.0, 3.1, 3.0, 3.25]), by_seed([3.4, 3.6, 3.5, 3.5])
    first[2] = None
    test = known(sequential_test(LOOKS, first, second))
    assert [each.counts for _, each in test.looks] == [(2,), (3,)]
    expected = stats.ttest_rel([3.0, 3.0, 3.25], [3.4, 3.5, 3.5]).pvalue
    assert test.looks[1][1].p == pytest.approx(expected, rel=1e-9)
    assert sequential_test(LOOKS, dict.fromkeys(first), second) is None


@pytest.mark.parametrize("against", [None, "c0"])
def test_the_simulation_decides_as_a_sweep_does(script: ModuleType, against: str | None) -> None:
    means = np.array([0.0, 0.0, 1.5, 4.0])
    values = script.losses(np.random.default_rng(3), means, script.normal, 25)
    plan = plan_of([f"c{index}" for index in range(4)], against)
    pairs = [(index, 0) for index in (1, 2, 3)] if against else [(a, b) for a in range(4) for b in range(a + 1, 4)]
    first, second = np.array(pairs).T
    ps, signs = script.tests(values[:, first] - values[:, second])
    decisions = script.rules(ps, signs)["until certain"]
    for at, sign, comparison in zip(decisions.at, decisions.sign, values, strict=True):
        decided: dict[tuple[str, str], int] = {}
        standing = standing_of(plan, {f"c{index}": by_seed(comparison[index]) for index in range(4)})
        for look in standing.looks:
            open_ = {frozenset(pair) for pair in look.undecided}
            for pair in pairs:
                names = (f"c{pair[0]}", f"c{pair[1]}")
                if frozenset(names) not in open_:
                    decided.setdefault(names, look.seeds)
        assert [decided.get((f"c{a}", f"c{b}"), 0) for a, b in pairs] == at.tolist()
        outcomes = {(each.first, each.second): each.outcome for each in standing.verdicts}
        for (a, b), direction, count in zip(pairs, sign, at, strict=True):
            better = outcomes.get((f"c{a}", f"c{b}")) or {"better": "worse", "worse": "better"}.get(
                outcomes[f"c{b}", f"c{a}"], "cannot tell"
            )
            assert better == ("cannot tell" if not count else "better" if direction < 0 else "worse")


@pytest.mark.parametrize("contenders", [2, 9])
def test_equal_contenders_get_few_false_verdicts_but_many_from_repeated_tests(
    script: ModuleType, contenders: int
) -> None:
    (rule, _, naive) = (
        float(text.rstrip("%")) / 100
        for _, text in script.simulate(np.zeros(contenders), False, script.normal, 2000, 0)
    )
    assert rule < 0.05
    assert naive > 0.1


def test_the_simulation_prints_its_tables(script: ModuleType, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["measure_sequential.py", "--comparisons", "20"])
    script.main()
    shown = capsys.readouterr().out
    assert shown.count("| 9, all pairs |") >= 2
    assert "of 20" in shown
