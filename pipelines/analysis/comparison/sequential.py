"""Tests of pairs whose number of seeds depends on their results, with an error rate that is spent over the looks.

A pair is tested by paired t-tests after its first n seeds, for n = `first`, ..., `last`. By n seeds, a level alpha is
spent up to alpha * (n / last)^3: a spending function of Lan and DeMets (1983, Biometrika 70, 659), of the power family
of Kim and DeMets (1987, Biometrika 74, 149). A look rejects if its p is below what it spends.

By the union bound, which holds for any dependence between looks, p = min over the looks of (look's p) / (look's share)
is a p-value of the whole series, and of each series that ends earlier, whatever ends it. Unlike boundaries of normal
tests, this holds for few degrees of freedom, and Holm's procedure takes these p-values like any others: it is then the
group sequential Holm procedure (Ye, Li, Liu and Yao 2013, Stat. Med. 32, 1112; Maurer and Bretz 2013, Stat. Biopharm.
Res. 5, 311). What it rejects after a look it also rejects after later ones. `docs/measure_sequential.py` measures it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import ClassVar

from pipelines.analysis.comparison.results import TestName
from pipelines.analysis.comparison.t_tests import TTest, paired

Results = Mapping[int, float | None]
"""Final values by seed; None for a run that diverged. Runs that have not ended are absent."""

EXPONENT = 3
"""With 3, a pair of 8 seeds at most keeps a third of its error rate for the last look; a smaller one decides earlier,
and fewer pairs."""


@dataclass(frozen=True)
class Looks:
    """When pairs are tested: after `first`, `first + 1`, ... of the seeds."""

    first: int
    seeds: tuple[int, ...]
    """All that may be trained, in their order."""

    def share(self, count: int) -> float:
        """Return the share of the error rate that the look after `count` seeds spends."""
        before = 0 if count == self.first else count - 1
        spent, spent_before = ((number / len(self.seeds)) ** EXPONENT for number in (count, before))
        return spent - spent_before


@dataclass(frozen=True)
class SequentialTest:
    """The looks at a pair, each a paired t-test of its first seeds."""

    looks: tuple[tuple[float, TTest], ...]
    """Each look's share of the error rate, and its test; in their order, one or more."""

    name: ClassVar[TestName] = "sequential"

    @property
    def p(self) -> float:
        """p-value, valid whatever ended the series."""
        share, test = self.deciding
        return min(1.0, test.p / share)

    @property
    def deciding(self) -> tuple[float, TTest]:
        """Share and test of the look with the strongest evidence."""
        return min(self.looks, key=lambda look: look[1].p / look[0])

    def at_level(self, level: float) -> tuple[float, TTest]:
        """Return share and test of the deciding look if it rejects at the level, else of the last one.

        The interval of this test at `share * level` is a repeated confidence interval: all looks' hold together.
        """
        return self.deciding if self.p < level else self.looks[-1]


def sequential_test(looks: Looks, first: Results, second: Results) -> SequentialTest | None:
    """Return the test of a pair after as many seeds as have ended on both sides; None if no look has a test.

    A seed of which a run diverged is left out of the tests, which then have fewer degrees of freedom.
    """
    ended = list(takewhile(lambda seed: seed in first and seed in second, looks.seeds))
    tests = ((count, _paired(first, second, ended[:count])) for count in range(looks.first, len(ended) + 1))
    found = tuple((looks.share(count), test) for count, test in tests if test is not None)
    return SequentialTest(found) if found else None


def _paired(first: Results, second: Results, seeds: Sequence[int]) -> TTest | None:
    sides = [(first[seed], second[seed]) for seed in seeds]
    finished = [(a, b) for a, b in sides if a is not None and b is not None]
    return paired([a for a, _ in finished], [b for _, b in finished])


def sequential_rule(looks: Looks) -> str:
    """Describe the test, in a sentence or two."""
    last = len(looks.seeds)
    return (
        " Pairs of contenders whose seeds were added until certain have a sequential test instead: paired t-tests "
        f"after {looks.first} to {last} seeds, where n seeds spend (n/{last})^{EXPONENT} of the error rate; its p is "
        "the smallest, over these looks, of the t-test's p divided by the share that the look spends."
    )
