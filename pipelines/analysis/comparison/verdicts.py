"""Intervals over seeds, significance of differences, and both as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from statistics import mean, stdev

from pipelines.analysis.comparison.results import Comparison, Entry, Interval, Outcome, Verdict
from pipelines.tasks.metric import Metric

_OPPOSITE: Mapping[Outcome, Outcome] = {"better": "worse", "worse": "better", "cannot tell": "cannot tell"}


def interval(values: Sequence[float], confidence: float) -> Interval | None:
    """Return the mean of the values, with Student's t interval for two or more; None without values."""
    if not values:
        return None
    middle, count = mean(values), len(values)
    if count < 2:
        return Interval(middle, None, None, None, count)
    std = stdev(values)  # computed exactly: equal values give 0
    half = _quantile(count - 1, confidence) * std / math.sqrt(count)
    return Interval(middle, middle - half, middle + half, std, count)


def welch(first: Interval, second: Interval, confidence: float) -> tuple[Interval, float | None]:
    """Return the difference of two means, first minus second, and p of Welch's test that it is 0.

    Without two values on each side, or without any variance, there is no test, and the difference has no interval.
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
    """Return p-values after Holm's step-down correction, which bounds the family-wise error rate."""
    corrected = [0.0] * len(ps)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        corrected[index] = largest
    return corrected


def verdicts(contenders: Sequence[Entry], confidence: float, metric: Metric) -> tuple[Verdict, ...]:
    """Return the verdicts of all pairs of contenders with a finished run, in their order."""
    finals = [(entry.label, entry.final) for entry in contenders if entry.final is not None]
    pairs = [(a, b, *welch(first, second, confidence)) for (a, first), (b, second) in combinations(finals, 2)]
    corrected = iter(holm([p for *_, p in pairs if p is not None]))
    found = []
    for first, second, difference, raw in pairs:
        p = None if raw is None else next(corrected)
        found.append(Verdict(first, second, _outcome(metric.sign * difference.mean, p, confidence), difference, p))
    return tuple(found)


def rule(confidence: float, metric: Metric) -> str:
    """Describe the rule of `verdicts`."""
    return (
        f"The verdict is better or worse only if Welch's t-test on the final validation {metric.plural} over seeds "
        f"gives p < {1 - confidence:.3g} after Holm's correction over all pairs. With fewer than two seeds on a side, "
        "or if all seeds of each side end alike, it is cannot tell."
    )


def _outcome(extra_cost: float, p: float | None, confidence: float) -> Outcome:
    if p is None or p >= 1 - confidence:
        return "cannot tell"
    return "better" if extra_cost < 0 else "worse"


def _quantile(degrees: float, confidence: float) -> float:
    """Return the half width, in standard errors, of the central `confidence` of Student's t distribution."""
    # Not scipy.stats: its import takes a second, and `ttest_ind` loses digits and warns if seeds end almost equal.
    from scipy.special import stdtrit

    return float(stdtrit(degrees, (1 + confidence) / 2))


def _two_sided_p(t: float, degrees: float) -> float:
    from scipy.special import stdtr

    return float(2 * stdtr(degrees, -abs(t)))


def by_pair(comparison: Comparison) -> dict[tuple[str, str], Verdict]:
    """Return the verdicts by pairs of labels, in both orders."""
    both = [*comparison.verdicts, *map(_reversed, comparison.verdicts)]
    return {(verdict.first, verdict.second): verdict for verdict in both}


def _reversed(verdict: Verdict) -> Verdict:
    difference = verdict.difference
    if difference is not None:
        low = None if difference.high is None else -difference.high
        high = None if difference.low is None else -difference.low
        difference = replace(difference, mean=-difference.mean, low=low, high=high)
    outcome = _OPPOSITE[verdict.outcome]
    return replace(verdict, first=verdict.second, second=verdict.first, outcome=outcome, difference=difference)


def headline(comparison: Comparison) -> str:
    """Say which contender ends best, by how much, and whether that is certain."""
    metric = comparison.metric
    ranked = [entry for entry in comparison.contenders if entry.final is not None]
    if not ranked:
        return f"No run has finished: there is no final {metric.name} to compare."
    best, others = ranked[0], ranked[1:]
    assert best.final is not None
    end = metric.text(best.final.mean)
    if not others:
        return f"{best.label} ends at {end}; no other has finished to compare it with."
    verdicts = by_pair(comparison)
    against = [verdicts[best.label, other.label] for other in others]
    ahead = f"{_margin(against[0], comparison)} {metric.either('below', 'above')} {others[0].label}, the next"
    beaten = sum(verdict.outcome == "better" for verdict in against)
    if against[0].outcome == "better":
        p = "" if against[0].p is None else f" (p = {against[0].p:.2g})"
        won = f"{best.label} wins: it ends at {end}, {ahead}, which is certain at {comparison.confidence:.0%}{p}."
        return won + _over(beaten, len(others))
    place = f"{best.label} ends {metric.either('lowest', 'highest')}, at {end}, {ahead}"
    doubt = f"{place}; whether it is truly better is uncertain."
    return doubt + _over(beaten, len(others))


def _margin(verdict: Verdict, comparison: Comparison) -> str:
    """Format by how much the first is better, and the interval of this difference."""
    metric, difference = comparison.metric, verdict.difference
    assert difference is not None
    margin = metric.difference(abs(difference.mean)) + metric.difference_unit
    if difference.low is None or difference.high is None:
        return margin
    low, high = map(metric.difference, sorted((-metric.sign * difference.low, -metric.sign * difference.high)))
    return f"{margin} ({comparison.confidence:.0%} interval {low} to {high})"


def _over(beaten: int, others: int) -> str:
    """Say how many of the others are certainly worse than the best."""
    if others == 1 or not beaten:
        return ""
    if beaten == others:
        return f" All {others} others are certainly worse."
    return f" {beaten} of {others} others {'is' if beaten == 1 else 'are'} certainly worse."
