"""The result of a comparison in a sentence or two."""

from __future__ import annotations

from pipelines.analysis.comparison.results import Comparison, Entry, Verdict
from pipelines.analysis.comparison.verdicts import by_pair


def headline(comparison: Comparison) -> str:
    """Say which contender ends best, by how much, and whether that is certain; with `against`, compared with it."""
    metric = comparison.metric
    ranked = [entry for entry in comparison.contenders if entry.final is not None]
    if not ranked:
        return f"No run has finished: there is no final {metric.name} to compare."
    if len(ranked) == 1:
        return f"{ranked[0].label} ends at {_end(comparison, ranked[0])}; no other has finished to compare it with."
    if comparison.against is not None:
        return _against(comparison, comparison.against)
    best, others = ranked[0], ranked[1:]
    verdicts = by_pair(comparison)
    against = [verdicts[best.label, other.label] for other in others]
    ahead = f"{_margin(against[0], comparison)} {metric.either('below', 'above')} {others[0].label}, the next"
    beaten = sum(verdict.outcome == "better" for verdict in against)
    end = _end(comparison, best)
    if against[0].outcome == "better":
        p = "" if against[0].p is None else f" (p = {against[0].p:.2g})"
        won = f"{best.label} wins: it ends at {end}, {ahead}, which is certain at {comparison.confidence:.0%}{p}."
        return won + _over(beaten, len(others))
    place = f"{best.label} ends {metric.either('lowest', 'highest')}, at {end}, {ahead}"
    doubt = f"{place}; whether it is truly better is uncertain."
    return doubt + _over(beaten, len(others))


def _against(comparison: Comparison, reference: Entry) -> str:
    """Compare the best other contender with the reference, and count the others."""
    best, *others = comparison.verdicts
    assert best.difference is not None
    side = "below" if best.difference.mean < 0 else "above"
    certain = f"certain at {comparison.confidence:.0%}" if best.outcome != "cannot tell" else "uncertain"
    p = "" if best.p is None else f" (p = {best.p:.2g})"
    sentence = (
        f"Against {reference.label}, which ends at {_end(comparison, reference)}: {best.first} ends "
        f"{_margin(best, comparison)} {side} it, which is {certain}{p}."
    )
    if not others:
        return sentence
    better, worse = (sum(each.outcome == outcome for each in comparison.verdicts) for outcome in ("better", "worse"))
    return f"{sentence} Of all {len(others) + 1} others, {better} certainly better, {worse} certainly worse."


def _end(comparison: Comparison, entry: Entry) -> str:
    assert entry.final is not None
    return comparison.metric.text(entry.final.mean)


def _margin(verdict: Verdict, comparison: Comparison) -> str:
    """Format the size of a difference, and its interval."""
    metric, difference = comparison.metric, verdict.difference
    assert difference is not None
    margin = metric.difference(abs(difference.mean)) + metric.difference_unit + _tested(verdict, comparison)
    if difference.low is None or difference.high is None:
        return margin
    turned = -1 if difference.mean < 0 else 1
    low, high = map(metric.difference, sorted((turned * difference.low, turned * difference.high)))
    return f"{margin} ({comparison.confidence:.0%} interval {low} to {high})"


def _tested(verdict: Verdict, comparison: Comparison) -> str:
    """Name the seeds of a difference that is not the one of the means: an earlier look of a sequential test decided."""
    pair = [entry for entry in comparison.contenders if entry.label in (verdict.first, verdict.second)]
    counts = {entry.final.count for entry in pair if entry.final is not None}
    if verdict.test != "sequential" or verdict.difference is None or counts == {verdict.difference.count}:
        return ""
    return f" in {verdict.difference.count} seeds of each"


def _over(beaten: int, others: int) -> str:
    """Say how many of the others are certainly worse than the best."""
    if others == 1 or not beaten:
        return ""
    if beaten == others:
        return f" {'Both' if others == 2 else f'All {others}'} others are certainly worse."
    return f" {beaten} of {others} others {'is' if beaten == 1 else 'are'} certainly worse."
