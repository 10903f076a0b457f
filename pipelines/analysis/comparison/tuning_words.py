"""What the tuning budgets say, in sentences."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from pipelines.analysis.comparison.results import Comparison, Tuning
from pipelines.analysis.comparison.tables import digits, with_tuning
from pipelines.tasks.metric import Metric


def tuning_words(comparison: Comparison) -> list[str]:
    """Say which contender is best after how many trials, and which reaches the target first, its trials included."""
    tunings = comparison.tunings
    if len(tunings) < 2:
        return []
    if not are_alike(tunings):
        return ["The trials differ in length, data or kind of search: their curves do not compare.", *_cost(comparison)]
    leaders = _leaders(tunings, comparison.metric)
    return [_winners(comparison, leaders), _certainty(tunings, leaders), *_cost(comparison)]


def are_alike(tunings: Sequence[Tuning]) -> bool:
    """Return whether the trials of all contenders have the same length and data, and the same kind of curve."""
    kinds = {
        (each.whole_trial("steps"), each.whole_trial("tokens"), run.data.get("fingerprint"), each.is_expected)
        for each in tunings
        for run in each.trials[:1]
    }
    return len(kinds) == 1


def _leaders(tunings: Sequence[Tuning], metric: Metric) -> list[Tuning]:
    """Return the best contender for each number of trials that all have; of equally good ones, the last leader."""
    leaders: list[Tuning] = []
    for place in range(min(each.counted for each in tunings)):
        costs = [metric.sign * each.best[place] for each in tunings]
        best = [each for each, cost in zip(tunings, costs, strict=True) if cost == min(costs)]
        leaders.append(leaders[-1] if leaders and leaders[-1] in best else best[0])
    return leaders


def _winners(comparison: Comparison, leaders: Sequence[Tuning]) -> str:
    metric = comparison.metric
    what = f"expected {metric.name}" if leaders[0].is_expected else f"{metric.name} so far"
    numbered = itertools.groupby(enumerate(leaders, start=1), key=lambda pair: pair[1].label)
    parts = [f"{label} with {_trials([number for number, _ in group])}" for label, group in numbered]
    more = max(each.counted for each in comparison.tunings) > len(leaders)
    return f"{metric.either('Lowest', 'Highest')} {what}: {', '.join(parts)}{', as many as all have' * more}."


def _certainty(tunings: Sequence[Tuning], leaders: Sequence[Tuning]) -> str:
    if not leaders[0].is_expected:
        return "These are the results of one order of trials, with one seed each: small differences are chance."
    places = range(len(leaders))
    overlap = [place + 1 for place in places if any(_overlap(leaders[place], each, place) for each in tunings)]
    if not overlap:
        return "No band overlaps with that of the leader."
    where = "For every number of trials" if len(overlap) == len(leaders) else f"With {_trials(overlap)}"
    return f"{where}, the leader's band overlaps with another: who leads there is not certain."


def _overlap(first: Tuning, second: Tuning, place: int) -> bool:
    """Return whether the bands of two contenders overlap."""
    if first is second or first.band is None or second.band is None:
        return False
    (low, high), (other_low, other_high) = first.band[:, place], second.band[:, place]
    return bool(low <= other_high and other_low <= high)


def _trials(numbers: Sequence[int]) -> str:
    """Return numbers in words, ascending: `1 to 3, 5 trials`."""
    runs = itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    ranges = [[number for _, number in run] for _, run in runs]
    texts = [str(each[0]) if len(each) == 1 else f"{each[0]} to {each[-1]}" for each in ranges]
    return f"{', '.join(texts)} trial{'s' if numbers[-1] > 1 else ''}"


def _cost(comparison: Comparison) -> list[str]:
    """Say which contenders reach the target with the fewest tokens, those of their trials included."""
    sums = ((with_tuning(each, "tokens"), each) for each in comparison.tunings)
    found = sorted(((cost, each) for cost, each in sums if cost is not None), key=lambda pair: pair[0])
    if comparison.target is None or not found:
        return []
    least, target = found[0][0], comparison.metric.text(comparison.target.value)
    best = [each for cost, each in found if cost == least]
    labels = ", ".join(each.label for each in best)
    first = (
        f"Fewest {comparison.unit} to the target ({target}), trials included: {labels} with {digits(least)}, "
        f"{digits(best[0].total('tokens'))} of them for trials."
    )
    return [first, *(f"Next: {other.label} with {digits(cost)}." for cost, other in found[len(best) :][:1])]
