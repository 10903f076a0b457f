"""Intervals over seeds, and whether a difference is more than chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from statistics import mean, stdev

from pipelines.analysis.comparison.results import Entry, Interval, Outcome, Verdict


def interval(values: Sequence[float], confidence: float) -> Interval | None:
    """The mean of one value or more, with Student's t interval where there are two; None without any."""
    if not values:
        return None
    middle, count = mean(values), len(values)
    if count < 2:
        return Interval(middle, None, None, None, count)
    std = stdev(values)  # exact: equal values have none at all
    half = _quantile(count - 1, confidence) * std / math.sqrt(count)
    return Interval(middle, middle - half, middle + half, std, count)


def welch(first: Interval, second: Interval, confidence: float) -> tuple[Interval, float | None]:
    """The difference of two means, first minus second, and p of Welch's test for its being 0.

    There is no test, and the difference has a mean only, where a side has fewer than two values, or no value
    differs from the others on its side: such values do not tell how far chance reaches.
    """
    middle, count = first.mean - second.mean, min(first.count, second.count)
    parts = [(each.std or 0.0) ** 2 / each.count for each in (first, second)]
    if count < 2 or sum(parts) == 0.0:
        return Interval(middle, None, None, None, count), None
    degrees = sum(parts) ** 2 / sum(
        part**2 / (each.count - 1) for part, each in zip(parts, (first, second), strict=True)
    )
    error = math.sqrt(sum(parts))
    half = _quantile(degrees, confidence) * error
    return Interval(middle, middle - half, middle + half, None, count), _two_sided_p(middle / error, degrees)


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the chance that any of the tests errs stays below the level asked of each."""
    corrected = [0.0] * len(ps)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        corrected[index] = largest
    return corrected


def verdicts(contenders: Sequence[Entry], confidence: float) -> tuple[Verdict, ...]:
    """Of every pair of contenders with a final loss, in their order."""
    finals = [(entry.label, entry.final) for entry in contenders if entry.final is not None]
    pairs = [(a, b, *welch(first, second, confidence)) for (a, first), (b, second) in combinations(finals, 2)]
    corrected = iter(holm([p for *_, p in pairs if p is not None]))
    found = []
    for first, second, difference, raw in pairs:
        p = None if raw is None else next(corrected)
        found.append(Verdict(first, second, _outcome(difference, p, confidence), difference, p))
    return tuple(found)


def rule(confidence: float) -> str:
    """How `verdicts` decides, in words."""
    return (
        f"Better or worse is said only where Welch's t-test on the final validation losses over seeds gives "
        f"p < {1 - confidence:.3g} after Holm's correction over all pairs. Fewer than two seeds on a side, or seeds "
        "that all end alike, cannot tell."
    )


def _outcome(difference: Interval, p: float | None, confidence: float) -> Outcome:
    if p is None or p >= 1 - confidence:
        return "cannot tell"
    return "better" if difference.mean < 0 else "worse"


def _quantile(degrees: float, confidence: float) -> float:
    """How many standard errors to each side hold `confidence` of Student's t distribution."""
    from scipy.special import stdtrit  # scipy.stats has more, but takes two seconds to import

    return float(stdtrit(degrees, (1 + confidence) / 2))


def _two_sided_p(t: float, degrees: float) -> float:
    from scipy.special import stdtr

    return float(2 * stdtr(degrees, -abs(t)))
