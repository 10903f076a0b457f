"""Which contender of a pair is better, and whether that is certain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from pipelines.analysis.comparison.results import Comparison, Entry, Interval, Outcome, Verdict
from pipelines.analysis.comparison.sequential import SequentialTest, sequential_rule, sequential_test
from pipelines.analysis.comparison.settings import identity, settings_of
from pipelines.analysis.comparison.t_tests import TTest, holm, holm_levels, paired, seeds_needed, welch
from pipelines.analysis.comparison.until_certain import Member
from pipelines.errors import UsageError
from pipelines.tasks.metric import Metric

_OPPOSITE: Mapping[Outcome, Outcome] = {"better": "worse", "worse": "better", "cannot tell": "cannot tell"}

_OF_THE_PAIRED = ("branch", "data", "evaluation.", "model.", "training.batch_size", "training.steps")
"""Settings, or prefixes, that are equal in a paired test: runs of one seed then share initialization and batches."""


@dataclass(frozen=True)
class Side:
    """What a test needs of a contender."""

    label: str
    final: Interval
    values: tuple[float, ...]
    """Final values of the finished runs, by seed."""
    seeds: tuple[int | None, ...]
    """Their seeds, ascending; None if a log does not say it."""
    work: str
    """Equal for contenders that can be paired."""
    member: Member | None = None
    """Of a sweep that added seeds until certain."""


def verdicts(
    contenders: Sequence[Entry],
    confidence: float,
    metric: Metric,
    against: Entry | None = None,
    members: Mapping[str, Member] | None = None,
) -> tuple[Verdict, ...]:
    """Return the verdicts of all pairs of contenders with a finished run, in their order.

    With `against`, only those of the pairs with that contender, which is the second of each. `members` are contenders,
    by label, whose seeds were added until certain.
    """
    sides = list(sides_of(contenders, members or {}))
    return judge(pairs_of(sides, None if against is None else against.label), confidence, metric)


def pairs_of(sides: Sequence[Side], against: str | None) -> list[tuple[Side, Side]]:
    """Return the pairs that are tested: all, or those with one label, which is the second of each."""
    if against is None:
        return list(combinations(sides, 2))
    (reference,) = (side for side in sides if side.label == against)
    return [(side, reference) for side in sides if side is not reference]


def judge(pairs: Sequence[tuple[Side, Side]], confidence: float, metric: Metric) -> tuple[Verdict, ...]:
    """Return the verdicts of the pairs, with Holm's correction over all of them."""
    tests = [_test(first, second) for first, second in pairs]
    ps = [test.p for test in tests if test is not None]
    judged = iter(zip(holm(ps), holm_levels(ps, 1 - confidence), strict=True))
    return tuple(
        _verdict(first, second, test, None if test is None else next(judged), confidence, metric)
        for (first, second), test in zip(pairs, tests, strict=True)
    )


def sides_of(contenders: Sequence[Entry], members: Mapping[str, Member]) -> Iterator[Side]:
    """Return the sides of the contenders with a finished run."""
    return (side for entry in contenders if (side := side_of(entry, members)) is not None)


def side_of(entry: Entry, members: Mapping[str, Member]) -> Side | None:
    """Return the side of a contender; None without a finished run."""
    if entry.final is None:
        return None
    found = [(run.seed, run.final) for run in entry.runs if run.final is not None]
    settings = settings_of(entry.runs[0])
    work = {key: value for key, value in settings.items() if key.startswith(_OF_THE_PAIRED)}
    seeds, values = zip(*found, strict=True)
    return Side(entry.label, entry.final, values, seeds, identity(work), members.get(entry.label))


def _test(first: Side, second: Side) -> TTest | SequentialTest | None:
    if first.member and second.member and first.member.folder == second.member.folder:
        return sequential_test(first.member.record.plan, first.member.results, second.member.results)
    distinct = len(set(first.seeds)) == len(first.seeds) and None not in first.seeds
    if distinct and first.seeds == second.seeds and first.work == second.work:
        return paired(first.values, second.values)
    return welch(first.values, second.values)


def _verdict(
    first: Side,
    second: Side,
    test: TTest | SequentialTest | None,
    judged: tuple[float, float] | None,
    confidence: float,
    metric: Metric,
) -> Verdict:
    """Return the verdict from a test, its corrected p and its level; "cannot tell" without a test."""
    if test is None or judged is None:
        mean, count = first.final.mean - second.final.mean, min(len(first.seeds), len(second.seeds))
        return Verdict(first.label, second.label, "cannot tell", Interval(mean, None, None, None, count), None)
    p, level = judged
    is_sequential, alpha = isinstance(test, SequentialTest), 1 - confidence
    share, shown = test.at_level(level) if isinstance(test, SequentialTest) else (1.0, test)
    outcome: Outcome = "cannot tell"
    if p < alpha:
        outcome = "better" if metric.sign * shown.difference < 0 else "worse"
    return Verdict(
        first=first.label,
        second=second.label,
        outcome=outcome,
        difference=Interval(shown.difference, *shown.bounds(1 - share * alpha), None, min(shown.counts)),
        p=p,
        test=test.name,
        corrected=shown.bounds(1 - share * level),
        seeds_needed=None if is_sequential or outcome != "cannot tell" else seeds_needed(shown, level),
    )


def rule(
    confidence: float, metric: Metric, against: Entry | None = None, members: Mapping[str, Member] | None = None
) -> str:
    """Describe the rule of `verdicts`."""
    pairs = "all pairs" if against is None else f"the pairs with {against.label}"
    plans = dict.fromkeys(member.record.plan for member in (members or {}).values())
    return (
        f"The verdict is better or worse only if a t-test on the final validation {metric.plural} over seeds gives "
        f"p < {1 - confidence:.3g} after Holm's correction over {pairs}. The test is paired, on the differences by "
        "seed, if both have the same seeds, data, model, batch size and number of steps: runs of one seed then share "
        "initialization and batches. Otherwise it is Welch's. With fewer than two seeds on a side, or if all seeds of "
        "each side end alike, or all differences are equal, it is cannot tell."
    ) + "".join(map(sequential_rule, plans))


def contender_named(contenders: Sequence[Entry], name: str, option: str) -> Entry:
    """Return the contender with this label, or else the only one with this name in its sweep, or this optimizer.

    Raises `UsageError`, which names the `option`, if there is none, or several.
    """
    named = [entry for entry in contenders if entry.label == name]
    named = named or [entry for entry in contenders if any(run.name_in_sweep == name for run in entry.runs)]
    named = named or [entry for entry in contenders if entry.optimizer == name]
    if len(named) != 1:
        known = ", ".join(repr(entry.label) for entry in named or contenders)
        problem = "several contenders have this name or optimizer" if named else "no contender has this name"
        raise UsageError(f"{option} {name}: {problem}; choose one of {known}")
    return named[0]


def by_pair(comparison: Comparison) -> dict[tuple[str, str], Verdict]:
    """Return the verdicts by pairs of labels, in both orders."""
    both = [*comparison.verdicts, *map(_reversed, comparison.verdicts)]
    return {(verdict.first, verdict.second): verdict for verdict in both}


def _reversed(verdict: Verdict) -> Verdict:
    difference, corrected = verdict.difference, verdict.corrected
    if difference is not None:
        low = None if difference.high is None else -difference.high
        high = None if difference.low is None else -difference.low
        difference = replace(difference, mean=-difference.mean, low=low, high=high)
    return replace(
        verdict,
        first=verdict.second,
        second=verdict.first,
        outcome=_OPPOSITE[verdict.outcome],
        difference=difference,
        corrected=None if corrected is None else (-corrected[1], -corrected[0]),
    )
