"""Group runs: those that differ only in the seed, also in the learning rate, or also in one other setting."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from statistics import median

import numpy as np

from pipelines.analysis.comparison.find_runs import contender_of
from pipelines.analysis.comparison.results import (
    Band,
    Curve,
    Entry,
    Reach,
    Run,
    Sensitivity,
    SensitivityPoint,
    SettingEffect,
    Target,
)
from pipelines.analysis.comparison.settings import (
    LOG,
    LR,
    Settings,
    differing_keys,
    identity,
    in_words,
    settings_of,
)
from pipelines.analysis.comparison.t_tests import interval
from pipelines.tasks.metric import Metric

_OF_THE_OPTIMIZER = ("optimizer.", "schedule.")
"""Settings that always differ between optimizers: labels show them only to distinguish entries of one optimizer."""

_WIDTH = "model.d_model"
"""The setting that describes a model best."""

_REFERENCES = ("adamw", "adam")
"""Optimizers whose final metric is the default target."""


@dataclass(frozen=True)
class Family:
    """Runs that differ only in seed and learning rate, trials included."""

    optimizer: str
    settings: Settings
    """Without the learning rate."""
    runs: tuple[Run, ...]
    """By learning rate, then by seed."""

    @property
    def results(self) -> tuple[Run, ...]:
        """The runs without the trials."""
        return tuple(run for run in self.runs if not run.is_trial)

    @property
    def lrs(self) -> list[float]:
        """The learning rates, ascending; none for runs of logs."""
        return sorted({run.lr for run in self.runs if run.lr is not None})


def families_of(runs: Sequence[Run]) -> list[Family]:
    """Group runs into families. Families of trials only are kept if they have several learning rates."""
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in sorted(runs, key=_order):
        groups[identity(without_lr(run))].append(run)
    families = [Family(group[0].optimizer, without_lr(group[0]), tuple(group)) for group in groups.values()]
    return [family for family in families if family.results or len(family.lrs) > 1]


def _order(run: Run) -> tuple[float, int, str]:
    return run.lr or 0.0, -1 if run.seed is None else run.seed, run.name


def without_lr(run: Run) -> Settings:
    """Return the settings that affect a run's result by more than chance, except the learning rate."""
    return {key: value for key, value in settings_of(run).items() if key != LR}


class Labels:
    """Names for families and entries: the optimizer, and the settings in which they differ."""

    def __init__(self, families: Sequence[Family]) -> None:
        self._names: dict[tuple[str, bool], str] = {}
        """Names of optimizers, by the optimizer and whether its runs are read from logs, which name few settings."""
        self._keys: dict[str, list[str]] = {}
        """The settings in the labels of the families with such a name."""
        self._keys_of_trials: dict[str, list[str]] = {}
        """What a search tried in vain does not make the labels of results longer."""
        self._says_lr: dict[str, bool] = {}
        self._rounded: dict[str, set[str]] = {}
        """The settings of which labels show four digits, because these distinguish all values."""
        for is_log in (False, True):
            alike = [family for family in families if (LOG in family.settings) == is_log]
            general = _distinguishing_keys(_with_results(alike), of_the_optimizer=False)
            general_of_trials = _distinguishing_keys(alike, of_the_optimizer=False)
            for optimizer in {family.optimizer for family in alike}:
                same = [family for family in alike if family.optimizer == optimizer]
                name = f"{optimizer} (log)" if is_log and (optimizer, False) in self._names else optimizer
                self._names[optimizer, is_log] = name
                self._keys[name] = _distinguishing_keys(_with_results(same), of_the_optimizer=True) + general
                self._keys_of_trials[name] = _distinguishing_keys(same, of_the_optimizer=True) + general_of_trials
                self._says_lr[name] = any(len({run.lr for run in family.results}) > 1 for family in same)
                self._rounded[name] = _keys_to_round(same)

    def family(self, family: Family) -> str:
        """Return the label of a family, such as `adamw d_model=256`."""
        name = self._names[family.optimizer, LOG in family.settings]
        keys = (self._keys if family.results else self._keys_of_trials)[name]
        return f"{name} {in_words(family.settings, keys, self._rounded[name])}".strip()

    def without(self, optimizer: str, settings: Settings, left_out: str | None) -> str:
        """Return the label of the family with these settings, without the setting `left_out`."""
        name = self._names[optimizer, LOG in settings]
        keys = [key for key in self._keys[name] if key != left_out]
        return f"{name} {in_words(settings, keys, self._rounded[name])}".strip()

    def entry(self, family: Family, lr: float | None) -> str:
        """Return the label of an entry, such as `adamw lr=0.001 d_model=256`."""
        name = self._names[family.optimizer, LOG in family.settings]
        if not self._says_lr[name]:
            return self.family(family)
        return f"{name} {in_words({**family.settings, LR: lr}, [LR, *self._keys[name]], self._rounded[name])}"


def _with_results(families: Sequence[Family]) -> list[Family]:
    return [family for family in families if family.results]


def _distinguishing_keys(families: Sequence[Family], *, of_the_optimizer: bool) -> list[str]:
    """Return the settings in which families differ; one of those that change together, such as width and heads."""
    tables = [family.settings for family in families]
    keys = [key for key in differing_keys(tables) if key.startswith(_OF_THE_OPTIMIZER) == of_the_optimizer]
    telling: dict[str, str] = {}
    for key in sorted(keys, key=lambda key: (key != _WIDTH, _unclear(key, tables))):
        values = [repr(table.get(key)) for table in tables]
        telling.setdefault(str([values.index(value) for value in values]), key)
    return sorted(telling.values(), key=lambda key: (key != _WIDTH, keys.index(key)))


def _unclear(key: str, tables: Sequence[Settings]) -> int:
    """Count the families without a setting, or with a number of many digits, such as a search tries."""
    return sum(
        key not in table or len(in_words(table, [key], rounded=[key])) < len(in_words(table, [key])) for table in tables
    )


def _keys_to_round(families: Sequence[Family]) -> set[str]:
    """Return the settings whose values four digits distinguish."""
    tables = [{**family.settings, LR: run.lr} for family in families for run in family.runs]

    def count(key: str, rounded: Container[str]) -> int:
        return len({in_words(table, [key], rounded) for table in tables})

    return {key for key in differing_keys(tables) if count(key, rounded=[key]) == count(key, rounded=())}


def entries_of(families: Sequence[Family], labels: Labels, confidence: float, metric: Metric) -> list[Entry]:
    """Return an entry per learning rate of each family, the best first; entries without a finished run come last."""
    entries = []
    for family in families:
        groups: dict[float | None, list[Run]] = defaultdict(list)
        for run in family.results:
            groups[run.lr].append(run)
        for lr, group in groups.items():
            entries.append(_entry(labels.entry(family, lr), labels.family(family), group, confidence))
    return sorted(entries, key=lambda entry: (entry.final is None, _cost(entry, metric), entry.label))


def contenders_of(entries: Sequence[Entry]) -> list[Entry]:
    """Return each family's entry with the most finished seeds, then the best mean, in the order of `entries`."""
    best: dict[str, Entry] = {}
    for entry in entries:  # the best first
        if entry.family not in best or finished(entry) > finished(best[entry.family]):
            best[entry.family] = entry
    return [entry for entry in entries if best[entry.family] is entry]


def finished(entry: Entry) -> int:
    """Return the number of finished seeds."""
    return 0 if entry.final is None else entry.final.count


def _cost(entry: Entry, metric: Metric) -> float:
    """Return what entries are sorted by: the final mean, or else the best validation."""
    if entry.final is not None:
        return metric.sign * entry.final.mean
    return min((metric.sign * run.best for run in entry.runs if run.best is not None), default=float("inf"))


def _entry(label: str, family: str, runs: Sequence[Run], confidence: float) -> Entry:
    ended = [run for run in runs if run.state == "finished"]
    going = ended or [run for run in runs if run.state == "unfinished"]
    return Entry(
        label=label,
        optimizer=runs[0].optimizer,
        family=family,
        lr=runs[0].lr,
        runs=tuple(runs),
        final=interval([run.final for run in runs if run.final is not None], confidence),
        final_train=interval([run.final_train for run in runs if run.final_train is not None], confidence),
        train=_band([run.smoothed.since(run.drawn_from) for run in going]),
        val=_band([run.val.since(run.drawn_from) for run in going]),
        reach=None,
        step_ms=_median([run.step_ms for run in runs]),
        optimizer_ms=_median([run.optimizer_ms for run in runs]),
        state_bytes=next((run.state_bytes for run in runs if run.state_bytes is not None), None),
    )


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _band(curves: Sequence[Curve]) -> Band | None:
    """Return the band of curves over their common steps; None without common steps."""
    if not curves:
        return None
    steps = reduce(np.intersect1d, [curve.steps for curve in curves])
    if not len(steps):
        return None
    rows = [np.isin(curve.steps, steps) for curve in curves]
    values = np.stack([curve.values[row] for curve, row in zip(curves, rows, strict=True)])
    seconds = np.stack([curve.seconds[row] for curve, row in zip(curves, rows, strict=True)])
    return Band(
        steps=steps,
        tokens=curves[0].tokens[rows[0]],
        seconds=seconds.mean(axis=0),
        mean=values.mean(axis=0),
        lowest=values.min(axis=0),
        highest=values.max(axis=0),
    )


def target_of(contenders: Sequence[Entry], asked: float | None, metric: Metric) -> Target | None:
    """Return the given target, or else the final mean of the reference: adamw, adam, or the worst contender."""
    if asked is not None:
        return Target(asked, "asked for")
    ended = [entry for entry in contenders if entry.final is not None]
    if len(contenders) < 2 or not ended:
        return None
    named = (entry for name in _REFERENCES for entry in ended if entry.optimizer == name)
    reference = next(named, ended[-1])
    assert reference.final is not None
    return Target(reference.final.mean, f"{reference.label}'s final {metric.name}")


def with_reach(entry: Entry, target: Target | None, metric: Metric) -> Entry:
    """Return the entry with the times at which its runs reached the target."""
    if target is None:
        return entry
    places = [_first_to_reach(target, run, metric) for run in entry.runs]
    found = list(zip(entry.runs, places, strict=True))
    return replace(
        entry,
        reach=Reach(
            steps=tuple(None if at is None else int(run.val.steps[at]) for run, at in found),
            tokens=tuple(None if at is None else whole(run.val.tokens[at]) for run, at in found),
            seconds=tuple(None if at is None else known(run.val.seconds[at]) for run, at in found),
        ),
    )


def known(value: float) -> float | None:
    """Return the value; None for NaN, which stands for what is not recorded."""
    return None if np.isnan(value) else float(value)


def whole(value: float) -> int | None:
    """Return the value as a whole number; None for NaN."""
    return None if np.isnan(value) else int(value)


def _first_to_reach(target: Target, run: Run, metric: Metric) -> int | None:
    """Return the index of the first validation that is as good as the target or better; None if there is none."""
    places = np.flatnonzero(metric.sign * run.val.values <= metric.sign * target.value)
    return int(places[0]) if len(places) else None


def sensitivities_of(families: Sequence[Family], labels: Labels) -> list[Sensitivity]:
    """Return the sensitivities of families with results at two or more learning rates."""
    found = []
    for family in families:
        runs = [run for run in family.runs if run.state != "empty"]
        points = [_point(lr, [run for run in runs if run.lr == lr]) for lr in family.lrs]
        points = [point for point in points if point.values or point.diverged or point.unfinished]
        if len(points) > 1:
            searched = None if family.results else contender_of(family.runs[0].path)
            found.append(Sensitivity(labels.family(family), family.optimizer, tuple(points), searched))
    return found


def _point(lr: float, runs: Sequence[Run]) -> SensitivityPoint:
    stopped = [run.best for run in runs if run.state == "unfinished"]
    return SensitivityPoint(
        lr=lr,
        values=tuple(run.final for run in runs if run.final is not None),
        diverged=sum(run.state == "diverged" for run in runs),
        unfinished=tuple(best for best in stopped if best is not None),
    )


def setting_effects_of(contenders: Sequence[Entry], labels: Labels) -> list[SettingEffect]:
    """Return the effects of numeric settings: one per setting and group of contenders that differ only in it."""
    tables = [without_lr(entry.runs[0]) for entry in contenders]
    effects = []
    for key in differing_keys(tables):
        groups: dict[str, list[tuple[float, Entry]]] = defaultdict(list)
        for entry, table in zip(contenders, tables, strict=True):
            value = table.get(key)
            if isinstance(value, int | float) and not isinstance(value, bool):
                others = {name: setting for name, setting in table.items() if name != key}
                groups[identity(others)].append((value, entry))
        effects += [_effect(key, group, labels) for group in groups.values() if len(group) > 1]
    return effects


def _effect(key: str, group: Sequence[tuple[float, Entry]], labels: Labels) -> SettingEffect:
    values, entries = zip(*sorted(group, key=lambda pair: pair[0]), strict=True)
    label = labels.without(entries[0].optimizer, without_lr(entries[0].runs[0]), key)
    return SettingEffect(key, label, values, entries)
