"""The best result of the first k trials of each contender of a search: who wins at which tuning budget."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from pipelines.analysis.comparison.results import Array, Entry, Run, Tuning
from pipelines.storage import parse_json, printable
from pipelines.tasks.metric import Metric
from pipelines.training.run_folder import SEARCH_RECORD, TRIALS

RESAMPLES = 1000
_MOST_TRIALS = 999
"""As many as a search may have."""
_MOST_BYTES = 1_000_000
_NAME = re.compile(r"(.+)-t(\d{1,9})", re.ASCII)
_INDEPENDENT = ("random", "qmc")
"""Samplers whose trials do not depend on the results of earlier ones."""


class _Search(BaseModel):
    """What defines a search, from its record; equal for all its workers."""

    sweep: str
    sampler: str
    pruner: str
    seed: int
    space: dict[str, Any]


@dataclass(frozen=True)
class _Trials:
    """Trials of one contender."""

    contender: str
    search: _Search | None
    """None if its record is damaged."""
    folders: list[Path] = field(default_factory=list)
    """Folders of the search's runs, one for each worker."""
    runs: dict[int, Run] = field(default_factory=dict)
    """By number."""

    @property
    def sorted(self) -> list[Run]:
        """The runs in the order in which they were tried."""
        return [self.runs[number] for number in sorted(self.runs)][:_MOST_TRIALS]


def tunings_of(runs: Sequence[Run], entries: Sequence[Entry], confidence: float, metric: Metric) -> tuple[Tuning, ...]:
    """Return the tuning of each contender of a search that has a finished trial, in the order of `entries`."""
    finals = {_place(run): entry for entry in entries for run in entry.runs}
    found = []
    for trials in _trials_of(runs):
        entry = next((entry for folder in trials.folders if (entry := finals.get((folder, trials.contender)))), None)
        tuning = _tuning(trials, entry, confidence, metric)
        found += [] if tuning is None else [tuning]
    labels = [entry.label for entry in entries]
    places = {label: place for place, label in enumerate(labels)}
    return tuple(sorted(_with_labels(found, labels), key=lambda each: places.get(each.label, len(places))))


def _trials_of(runs: Iterable[Run]) -> list[_Trials]:
    """Group trials by contender and folder, and put those of several workers of one search together."""
    groups: dict[tuple[str, Path], dict[int, Run]] = {}
    for run in runs:
        path = run.path.resolve()
        match = _NAME.fullmatch(path.name)
        if run.is_trial and run.state != "empty" and match:
            groups.setdefault((match[1], path.parent), {})[int(match[2])] = run
    found: list[_Trials] = []
    for (name, folder), numbered in groups.items():
        search = _read_search(folder)
        # Workers of one search never have the same trial; two searches of the same file both have the first.
        alike = [each for each in found if search and (each.contender, each.search) == (name, search)]
        trials = next((each for each in alike if not each.runs.keys() & numbered.keys()), None)
        if trials is None:
            trials = _Trials(name, search)
            found.append(trials)
        trials.folders.append(folder.parent)
        trials.runs.update(numbered)
    return found


def _read_search(folder: Path) -> _Search | None:
    try:
        with (folder / SEARCH_RECORD).open("rb") as file:
            return _Search.model_validate(parse_json(file.read(_MOST_BYTES)))
    except (OSError, ValueError):
        return None


def _place(final: Run) -> tuple[Path, str]:
    """Return the folder of a final run, and its contender's name if it is of a search."""
    path = final.path.resolve()
    return path.parent, path.name.rpartition("-s")[0]


def _tuning(trials: _Trials, entry: Entry | None, confidence: float, metric: Metric) -> Tuning | None:
    search, runs = trials.search, trials.sorted
    prunes = search is not None and search.pruner != "none"
    counted = [run for run in runs if run.state != "unfinished" or prunes]
    finals = [run.final for run in counted if run.final is not None]
    if not finals:
        return None
    untrained = _untrained(runs, max(finals, key=lambda value: metric.sign * value))
    costs = metric.sign * np.array([untrained if run.final is None else run.final for run in counted])
    tokens = np.array([run.spent("tokens") for run in counted])
    tuning = Tuning(
        label=printable(trials.contender),
        optimizer=runs[0].optimizer,
        entry=entry,
        trials=tuple(runs),
        counted=len(counted),
        is_expected=False,
        best=metric.sign * np.minimum.accumulate(costs),
        band=None,
        tokens=np.cumsum(tokens),
    )
    if search is None or search.sampler not in _INDEPENDENT or prunes:
        return tuning
    band = np.sort(metric.sign * bootstrap_band(costs, confidence), axis=0)
    mean = tokens.mean() * np.arange(1, len(counted) + 1)
    best = metric.sign * expected_best(costs)
    return replace(tuning, is_expected=True, best=best, band=band, tokens=mean)


def _untrained(runs: Sequence[Run], default: float) -> float:
    """Return the value of the untrained model, which is what a diverged or pruned trial leaves."""
    untrained = [run.val.values[0] for run in runs if len(run.val.steps) and run.val.steps[0] == 0]
    return float(untrained[0]) if untrained else default


def expected_best(costs: Array) -> Array:
    """Return, for k = 1, ..., n, the mean of the lowest of the first k costs over all orders of n; along the last axis.

    It is the unbiased estimate of the mean over new trials ([Tang et al. 2020](https://arxiv.org/abs/2004.14355)).
    """
    best: Array = np.sort(costs, axis=-1) @ _chances(costs.shape[-1])
    return best


def _chances(count: int) -> Array:
    """Return P(the best of the first k has rank j) = C(n - j, k - 1) / C(n, k), in row j and column k from 1."""
    k = np.arange(1, count + 1)
    chances = np.empty((count, count))
    chances[0] = k / count
    for row in range(count - 1):
        chances[row + 1] = chances[row] * np.maximum(count - row - k, 0) / (count - row - 1)
    return chances


def bootstrap_band(costs: Array, confidence: float) -> Array:
    """Return the percentile interval of `expected_best` over resampled trials, as two rows: low and high."""
    drawn = np.random.default_rng(0).integers(len(costs), size=(RESAMPLES, len(costs)))
    ends = (0.5 - confidence / 2, 0.5 + confidence / 2)
    band: Array = np.quantile(expected_best(costs[drawn]), ends, axis=0)
    return band


def _with_labels(found: Sequence[Tuning], taken: Sequence[str]) -> list[Tuning]:
    """Label each by the entry of its final runs; where that is not unique, add the folder."""
    named = [each if each.entry is None else replace(each, label=each.entry.label) for each in found]
    counts = Counter(each.label for each in named)
    counts.update(label for label in taken if not any(each.entry and each.label == label for each in named))
    return [
        each if counts[each.label] == 1 else replace(each, label=f"{old.label} ({_folder(each)})")
        for old, each in zip(found, named, strict=True)
    ]


def _folder(tuning: Tuning) -> str:
    """Return the search's folder, relative to the common one of all runs."""
    return tuning.trials[0].name.rpartition("/")[0].removesuffix(TRIALS).rstrip("/") or TRIALS
