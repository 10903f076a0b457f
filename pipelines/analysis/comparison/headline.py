"""What a comparison says, in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pipelines.analysis.comparison.results import Comparison, Entry, Interval, Outcome, Verdict

_OPPOSITE: Mapping[Outcome, Outcome] = {"better": "worse", "worse": "better", "cannot tell": "cannot tell"}


def by_pair(comparison: Comparison) -> dict[tuple[str, str], Verdict]:
    """Every verdict by its two labels, in both orders."""
    both = [*comparison.verdicts, *map(_turned, comparison.verdicts)]
    return {(verdict.first, verdict.second): verdict for verdict in both}


def _turned(verdict: Verdict) -> Verdict:
    difference = verdict.difference
    if difference is not None:
        low = None if difference.high is None else -difference.high
        high = None if difference.low is None else -difference.low
        difference = replace(difference, mean=-difference.mean, low=low, high=high)
    outcome = _OPPOSITE[verdict.outcome]
    return replace(verdict, first=verdict.second, second=verdict.first, outcome=outcome, difference=difference)


def headline(comparison: Comparison) -> str:
    """Which contender ends lowest, by how much, and whether that is certain."""
    ranked = [entry for entry in comparison.contenders if entry.final is not None]
    if not ranked:
        return "No run has finished: there is no final loss to compare."
    best, others = ranked[0], ranked[1:]
    if not others:
        return f"{best.label} ends at {_loss(best)}; no other has finished to compare it with."
    verdicts = by_pair(comparison)
    against = [verdicts[best.label, other.label] for other in others]
    below = f"{_margin(against[0], comparison.confidence)} below {others[0].label}, the next"
    beaten = sum(verdict.outcome == "better" for verdict in against)
    if against[0].outcome == "better":
        p = "" if against[0].p is None else f" (p = {against[0].p:.2g})"
        won = (
            f"{best.label} wins: it ends at {_loss(best)}, {below}, which is certain at {comparison.confidence:.0%}{p}."
        )
        return won + _over(beaten, len(others))
    doubt = f"{best.label} ends lowest, at {_loss(best)}, {below}; whether it is truly better cannot be told."
    return doubt + _over(beaten, len(others))


def _loss(entry: Entry) -> str:
    assert entry.final is not None
    return f"{entry.final.mean:.4f}"


def _margin(verdict: Verdict, confidence: float) -> str:
    """How far the second is above the first."""
    difference = verdict.difference
    assert difference is not None
    return f"{abs(difference.mean):.4f}{_interval(difference, confidence)}"


def _interval(difference: Interval, confidence: float) -> str:
    if difference.low is None or difference.high is None:
        return ""
    return f" ({confidence:.0%} interval {-difference.high:.4f} to {-difference.low:.4f})"


def _over(beaten: int, others: int) -> str:
    """How many of several others are certainly worse than the best."""
    if others == 1 or not beaten:
        return ""
    if beaten == others:
        return f" All {others} others are certainly worse."
    return f" {beaten} of {others} others {'is' if beaten == 1 else 'are'} certainly worse."
