"""Warnings that runs may not be comparable: sentences that name the runs."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

from pipelines.analysis.comparison.entries import finished
from pipelines.analysis.comparison.find_runs import contender_of
from pipelines.analysis.comparison.results import Entry, Run, Sensitivity, SensitivityPoint, State
from pipelines.analysis.comparison.settings import differing_keys, in_words, settings_of
from pipelines.tasks import task_of
from pipelines.tasks.metric import Metric

_SHOWN = 4
_ORDER = "data.order"  # unlike other settings of the data, it does not change what validates


def cautions_of(
    runs: Sequence[Run],
    entries: Sequence[Entry],
    contenders: Sequence[Entry],
    sensitivities: Sequence[Sensitivity],
    metric: Metric,
) -> list[str]:
    """Return the warnings about the comparison, the most severe first."""
    results = [run for run in runs if not run.is_trial]
    return [
        *_no_results(results),
        *_different_work(entries, metric),
        *_not_finished(results, metric),
        *_odd_rows(runs, metric),
        *_branches(results),
        *_seeds(contenders),
        *_repeated_seeds(entries),
        *_chosen_by_result(entries, contenders, metric),
        *_best_at_an_end(sensitivities, metric),
        *_unequal_trials([run for run in runs if run.is_trial]),
        *_sentence(
            "Different devices or versions of torch",
            _owners(_of_folders(entries), _machine),
            "times do not compare",
        ),
        *by_value(
            "Different instruction sets of the CPU",
            entries,
            lambda run: run.environment.get("instructions", ""),
            "losses differ by rounding, and times do not compare",
        ),
        *by_value(
            "Different commits of the code",
            entries,
            lambda run: run.environment.get("git_commit", ""),
            "a difference may be the code's, not the optimizer's",
        ),
    ]


def some(names: Iterable[str]) -> str:
    """Join the distinct names; of many, only the first."""
    return ", ".join(_first(list(dict.fromkeys(names))))


def _first(items: Sequence[str]) -> list[str]:
    """Return a few items, or the first of many and the number of the others."""
    more = len(items) - _SHOWN
    return list(items) if more < 2 else [*items[: _SHOWN - 1], f"{items[_SHOWN - 1]} and {more} more"]


def _together(found: Sequence[str], consequence: str) -> list[str]:
    """Return one warning with all findings and their consequence; an empty list without findings."""
    return [f"{', '.join(_first(found))}{consequence}"] if found else []


def _owners(entries: Sequence[Entry], shown: Callable[[Run], str]) -> dict[str, list[str]]:
    """Group the labels of entries by the text `shown(run)` of their runs."""
    owners: dict[str, list[str]] = defaultdict(list)
    for entry in entries:
        for run in entry.runs:
            owners[shown(run)].append(entry.label)
    return owners


def by_value(what: str, entries: Sequence[Entry], shown: Callable[[Run], str], consequence: str) -> list[str]:
    """Return a warning with the entries of each text `shown(run)` that is not empty, if they differ."""
    owners = _owners(entries, shown)
    owners.pop("", None)
    return _sentence(what, owners, consequence)


def _sentence(what: str, owners: dict[str, list[str]], consequence: str) -> list[str]:
    """Return a warning with the owners of each value and the consequence; an empty list if all values are equal."""
    if len(owners) < 2:
        return []
    parts = some(f"{value or 'unknown'} ({some(names)})" for value, names in owners.items())
    return [f"{what}: {parts}; {consequence}."]


def _no_results(results: Sequence[Run]) -> list[str]:
    if results:
        return []
    return ["All runs are trials of a search: they show the effect of learning rates, but are not results."]


def _different_work(entries: Sequence[Entry], metric: Metric) -> list[str]:
    """Warn about differences that make results incomparable."""

    entries = _of_folders(entries)
    differing = differing_keys([settings_of(entry.runs[0]) for entry in entries])

    def owners(prefix: str) -> dict[str, list[str]]:
        keys = [key for key in differing if key.startswith(prefix) and (key != _ORDER or prefix == _ORDER)]
        return _owners(entries, lambda run: in_words(settings_of(run), keys))

    decays = any(_decays(run) for entry in entries for run in entry.runs[:1])
    at_other_rates = ", and at equal steps their learning rates have not decayed equally" if decays else ""
    return [
        *_sentence("Different data", owners("data"), f"their {metric.plural} do not compare"),
        *_sentence(
            "Different orders of the data", owners(_ORDER), "a difference may be the order's, not the optimizer's"
        ),
        *_sentence(
            "Validated on different amounts of data",
            _owners(entries, _validated_on),
            f"this changes {metric.plural} too",
        ),
        *_sentence("Different models", owners("model."), "a difference may be the model's, not the optimizer's"),
        *_sentence("Different batch sizes", owners("training.batch_size"), "equal steps are not equal work"),
        *_sentence(
            "Different amounts of training",
            _owners(entries, _budget),
            f"final {metric.plural} do not compare{at_other_rates}",
        ),
    ]


def _of_folders(entries: Sequence[Entry]) -> list[Entry]:
    """Return the entries of run folders, which say all settings."""
    return [entry for entry in entries if entry.runs[0].config is not None]


def _decays(run: Run) -> bool:
    return run.config is not None and run.config.schedule.kind != "constant"


def _validated_on(run: Run) -> str:
    assert run.config is not None
    tokens, samples = getattr(run.config.evaluation, "tokens", None), run.config.validation_samples
    if tokens is not None:
        return f"the first {tokens:,} tokens"
    return "all" if samples is None else f"{samples:,} samples"


def _budget(run: Run) -> str:
    assert run.config is not None
    training = run.config.training
    samples = training.steps * training.batch_size
    task = task_of(run.config)
    return f"{samples * task.units_per_sample(run.config):,} {task.unit}"


def _not_finished(results: Sequence[Run], metric: Metric) -> list[str]:
    by_state: dict[State, list[Run]] = defaultdict(list)
    for run in results:
        by_state[run.state].append(run)
    diverged, unfinished, empty = (by_state[state] for state in ("diverged", "unfinished", "empty"))
    decaying = [run for run in unfinished if _decays(run)]
    found = []
    if diverged:
        found.append(f"Diverged, so without a final {metric.name}: {some(run.name for run in diverged)}.")
    if unfinished:
        names = some(f"{run.name} ({run.reason})" for run in unfinished)
        curves = "their curves are drawn only if no seed has finished"
        found.append(f"Not finished, so without a final {metric.name}: {names}; {curves}.")
    if decaying:
        names = some(run.name for run in decaying)
        effect = f"brings {metric.plural} {metric.either('down', 'up')}"
        found.append(f"Stopped before the learning rate had decayed, which {effect}: {names}.")
    if empty:
        found.append(f"Nothing recorded yet: {some(run.name for run in empty)}.")
    return found


def _odd_rows(runs: Sequence[Run], metric: Metric) -> list[str]:
    repeated = [run.name for run in runs if run.repeated_rows]
    lost = [run.name for run in runs if run.lost_rows and run.state != "diverged"]
    found = []
    if repeated:
        found.append(f"Steps recorded more than once; the last record counts: {some(repeated)}.")
    if lost:
        found.append(f"{metric.plural.capitalize()} that are not finite, shown as gaps in the curves: {some(lost)}.")
    return found


def _branches(results: Sequence[Run]) -> list[str]:
    names = [run.name for run in results if run.lineage]
    unit = next((task_of(run.config).unit for run in results if run.config is not None), "")
    return _together(names, f": branches; their steps, {unit} and seconds include what their parents trained.")


def _seeds(contenders: Sequence[Entry]) -> list[str]:
    ended = [entry for entry in contenders if entry.final is not None]
    single = [entry.label for entry in ended if finished(entry) == 1]
    found = []
    if single:
        found.append(f"Only one finished seed: {some(single)}; a difference may be chance.")
    counts: dict[str, list[str]] = defaultdict(list)
    for entry in ended:
        counts[str(finished(entry))].append(entry.label)
    return found + _sentence("Unequal numbers of finished seeds", counts, "the means are not equally precise")


def _repeated_seeds(entries: Sequence[Entry]) -> list[str]:
    found = []
    for entry in entries:
        counts = Counter(run.seed for run in entry.runs if run.final is not None and run.seed is not None)
        repeated = [str(seed) for seed, count in counts.items() if count > 1]
        if repeated:
            found.append(f"{entry.label} has several runs of seed {some(repeated)}")
    return _together(found, ": they are not independent, and its interval is too narrow.")


def _chosen_by_result(entries: Sequence[Entry], contenders: Sequence[Entry], metric: Metric) -> list[str]:
    found = []
    for chosen in contenders:
        rivals = [entry for entry in entries if entry.family == chosen.family and finished(entry) == finished(chosen)]
        if chosen.final is not None and len(rivals) > 1:
            found.append(f"{chosen.label} was chosen among {len(rivals)} learning rates")
    bias = f"which is therefore slightly too {metric.either('low', 'high')}"
    return _together(found, f" by the same runs that give its final {metric.name}, {bias}.")


def _best_at_an_end(sensitivities: Sequence[Sensitivity], metric: Metric) -> list[str]:
    found = []
    costs = {id(each): min((_cost(point, metric) for point in each.points), default=math.inf) for each in sensitivities}
    for sensitivity in sensitivities:
        same = [each for each in sensitivities if each.searched == sensitivity.searched is not None]
        if any(costs[id(each)] < costs[id(sensitivity)] for each in same):
            continue  # of the other settings that the search tried, these are not the best
        points = sensitivity.points
        ended = [point for point in points if point.values]
        if not ended:
            continue
        best = min(ended, key=lambda point: _cost(point, metric))
        if best in (points[0], points[-1]):
            end = "lowest" if best is points[0] else "highest"
            found.append(f"{sensitivity.family}: the best learning rate, {best.lr:g}, is the {end} of those tried")
    return _together(found, "; the true best may lie beyond.")


def _cost(point: SensitivityPoint, metric: Metric) -> float:
    """Return what is minimized; infinity without finished runs."""
    return metric.sign * sum(point.values) / len(point.values) if point.values else math.inf


def _unequal_trials(trials: Sequence[Run]) -> list[str]:
    """Compare the numbers of trials by contender, over the folders of all workers of a search."""
    counts = Counter(contender_of(run.path) for run in trials if run.state != "empty")
    contenders: dict[str, list[str]] = defaultdict(list)
    for contender, count in counts.items():
        contenders[str(count)].append(contender)
    return _sentence("Unequal numbers of trials", contenders, "contenders with more trials had an advantage")


def _machine(run: Run) -> str:
    return f"{run.environment.get('device')} with torch {run.environment.get('torch')}"
