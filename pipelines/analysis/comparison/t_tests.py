"""Student's t: intervals over seeds, tests of a pair of contenders, and how many seeds a test needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev, variance

import numpy as np

from pipelines.analysis.comparison.results import Interval, TestName

# Not scipy.stats: its import takes half a second, and `ttest_ind` loses digits and warns if seeds end almost equal.
# scipy.special is imported in the functions that need it, for the same reason.

POWER = 0.8
MOST_SEEDS = 100
"""Above this, `seeds_needed` only says that it is more."""

_ROUNDING = 1e-12
"""Relative: a smaller spread of differences between seeds is due to rounding."""


def interval(values: Sequence[float], confidence: float) -> Interval | None:
    """Return the mean of the values, with Student's t interval for two or more; None without values."""
    if not values:
        return None
    middle, count = mean(values), len(values)
    if count < 2:
        return Interval(middle, None, None, None, count)
    std = stdev(values)  # computed exactly: equal values give 0
    half = quantile(count - 1, confidence) * std / math.sqrt(count)
    return Interval(middle, middle - half, middle + half, std, count)


@dataclass(frozen=True)
class TTest:
    """A t-test that a mean difference, first minus second, is 0."""

    name: TestName
    difference: float
    variances: tuple[float, ...]
    """Of the differences by seed (paired), or of the values of each side (Welch); not all 0."""
    counts: tuple[int, ...]
    """Numbers of seeds behind each variance, 2 or more."""

    @property
    def error(self) -> float:
        """Standard error of the difference."""
        return math.sqrt(sum(self._parts()))

    @property
    def degrees(self) -> float:
        """Degrees of freedom, after Welch and Satterthwaite; n - 1 of a single variance."""
        parts = self._parts()
        if len(parts) == 1:
            return self.counts[0] - 1
        return sum(parts) ** 2 / sum(part**2 / (count - 1) for part, count in zip(parts, self.counts, strict=True))

    @property
    def p(self) -> float:
        """Two-sided p-value."""
        from scipy.special import stdtr

        return float(2 * stdtr(self.degrees, -abs(self.difference / self.error)))

    def bounds(self, confidence: float) -> tuple[float, float]:
        """Return the ends of the difference's interval."""
        half = quantile(self.degrees, confidence) * self.error
        return self.difference - half, self.difference + half

    def with_seeds(self, count: int) -> TTest:
        """Return the test with the same difference and variances from other numbers of seeds."""
        return replace(self, counts=(count,) * len(self.counts))

    def _parts(self) -> list[float]:
        return [variance / count for variance, count in zip(self.variances, self.counts, strict=True)]


def welch(first: Sequence[float], second: Sequence[float]) -> TTest | None:
    """Return Welch's test of two independent samples; None for fewer than two values on a side, or without variance."""
    counts = (len(first), len(second))
    if min(counts) < 2:
        return None
    variances = (variance(first), variance(second))
    return TTest("Welch", mean(first) - mean(second), variances, counts) if any(variances) else None


def paired(first: Sequence[float], second: Sequence[float]) -> TTest | None:
    """Return the test of differences between values of equal seeds; None for fewer than two, or if all are equal."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    if len(differences) < 2:
        return None
    spread = stdev(differences)
    if spread <= _ROUNDING * max(map(abs, (*first, *second))):
        return None
    return TTest("paired", mean(first) - mean(second), (spread**2,), (len(differences),))


def holm(ps: Sequence[float]) -> list[float]:
    """Return p-values after Holm's step-down correction, which bounds the family-wise error rate."""
    corrected = [0.0] * len(ps)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        corrected[index] = largest
    return corrected


def holm_levels(ps: Sequence[float], level: float) -> list[float]:
    """Return the level at which Holm's procedure tests each p-value: the null is rejected if p is below its level.

    The smallest p has `level / n`, the next `level / (n - 1)`, and so on. The first that is not below its level ends
    the procedure: all later ones keep its level.
    """
    levels = [0.0] * len(ps)
    current, ended = 0.0, False
    for rank, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        current = current if ended else level / (len(ps) - rank)
        levels[index] = current
        ended = ended or ps[index] >= current
    return levels


def seeds_needed(test: TTest, level: float) -> int:
    """Return how many seeds each contender needs in total for a power of `POWER`; above `MOST_SEEDS`, that plus 1.

    The test is of the same kind, two-sided at `level`, with equal numbers of seeds; the observed difference and
    variances are taken for the true ones. The power is of the noncentral t distribution, in the difference's direction.
    """
    from scipy.special import nctdtr, stdtrit

    counts = range(2, MOST_SEEDS + 1)
    larger = [test.with_seeds(count) for count in counts]
    degrees = np.array([each.degrees for each in larger])
    noncentrality = abs(test.difference) / np.array([each.error for each in larger])
    powers = 1 - nctdtr(degrees, noncentrality, stdtrit(degrees, 1 - level / 2))
    enough = np.flatnonzero(powers >= POWER)
    return counts[int(enough[0])] if len(enough) else MOST_SEEDS + 1


def quantile(degrees: float, confidence: float) -> float:
    """Return the half width, in standard errors, of the central `confidence` of Student's t distribution."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, (1 + confidence) / 2))
