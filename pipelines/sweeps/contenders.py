"""Contenders of a search: their trials and their final runs."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipelines.config import RunConfig, flatten
from pipelines.errors import UsageError
from pipelines.resolve import Layer
from pipelines.sweeps.definition import Problems, Sweep, SweepRun, Variant, resolve_variants
from pipelines.sweeps.grid import Position, first_positions
from pipelines.sweeps.search_table import Around, Dimension, Range, Search
from pipelines.sweeps.shorter import shortened
from pipelines.tasks import TASKS
from pipelines.tasks.metric import METRICS, Metric, choose_metric


@dataclass(frozen=True)
class Contender:
    """One variant of a search, which is compared with the others at its best settings."""

    variant: Variant
    search: Search
    config: RunConfig
    """Configuration with the contender's own settings and the search's seed."""

    @property
    def name(self) -> str:
        """Prefix of the folders of its runs, before the trial's number or the seed."""
        return self.variant.name

    @property
    def whole(self) -> SweepRun:
        """A run of full length, to estimate the cost."""
        return SweepRun(self.name, self.name, self.config)

    @cached_property
    def own_trial(self) -> SweepRun:
        """A trial with the contender's own settings, to estimate the cost."""
        return self.trial(0, {})

    @cached_property
    def own(self) -> dict[str, Any]:
        """Its own value of each searched setting."""
        settings = flatten(self.config.model_dump(mode="json"))
        return {key: settings.get(key) for key in self.search.space}

    def at(self, position: Position) -> dict[str, float]:
        """Return the settings at a position of the grid."""
        rows = zip(self.search.rows.items(), position, strict=True)
        return {key: row.value(self.own[key], coordinate) for (key, row), coordinate in rows}

    def first_points(self) -> list[dict[str, float]]:
        """Return the settings with which a grid search begins."""
        return [self.at(position) for position in first_positions(self.points)]

    @property
    def points(self) -> list[int]:
        """Number of values of each row of a grid search."""
        return [row.points for row in self.search.rows.values()]

    def extremes(self) -> list[dict[str, Any]]:
        """Return the extreme values of the settings, one setting at a time."""
        found: list[dict[str, Any]] = []
        for key, dimension in self.search.space.items():
            if isinstance(dimension, Around):
                beyond = self.search.trials - math.prod(self.points) if self.search.sampler == "grid" else 0
                found += [{key: end} for end in dimension.ends(self.own[key], beyond)]
            elif isinstance(dimension, Range):
                found += [{key: dimension.low}, {key: dimension.high}]
            else:
                found += [{key: value} for value in dimension]
        return found

    def trial(self, number: int, settings: Mapping[str, Any]) -> SweepRun:
        """Return the run of a trial."""
        config = self.variant.resolve({**settings, "seed": self.search.seed})
        if self.search.steps is not None:
            config = shortened(config, self.search.steps)
        return SweepRun(self.trial_name(number), self.name, config)

    def trial_name(self, number: int) -> str:
        """Return the name of a trial's run."""
        return f"{self.name}-t{number}"

    def final(self, settings: Mapping[str, Any], seed: int) -> SweepRun:
        """Return a final run, with the best settings."""
        return SweepRun(self.final_name(seed), self.name, self.variant.resolve({**settings, "seed": seed}))

    def final_name(self, seed: int) -> str:
        """Return the name of a final run, which does not depend on its settings."""
        return f"{self.name}-s{seed}"


@dataclass(frozen=True)
class SearchPlan:
    """Contenders and seeds of a search."""

    name: str
    search: Search
    contenders: tuple[Contender, ...]
    seeds: tuple[int, ...]
    """Seeds of the final runs."""
    origin: str = ""
    """Sweep file, or name of a shipped sweep, for messages."""

    @property
    def metric(self) -> Metric:
        """What the best settings are chosen by."""
        return METRICS[self.search.metric]

    @property
    def finals(self) -> list[str]:
        """Names of the final runs."""
        return [contender.final_name(seed) for seed in self.seeds for contender in self.contenders]


def plan_search(sweep: Sweep, set_layer: Layer, seeds: Sequence[int] = ()) -> SearchPlan:
    """Check the search with every contender. Raises `UsageError` with one line for each problem."""
    assert sweep.search is not None
    search, final_seeds = sweep.search, tuple(seeds) or sweep.seeds
    if not final_seeds:
        raise UsageError(
            f"{sweep.origin}: the final runs of a search need seeds: add seeds = [1, 2, 3] or --seeds 1,2,3"
        )
    try:
        choose_metric(TASKS[sweep.task], search.metric, "search.metric")
    except UsageError as error:
        raise UsageError(f"{sweep.origin}: {error}") from None
    if search.seed in final_seeds:
        raise UsageError(
            f"{sweep.origin}: seed {search.seed} is search.seed, with which the best settings are chosen; remove it"
            " from the seeds of the final runs, or change search.seed"
        )
    variants = resolve_variants(sweep, set_layer)
    problems = Problems([variant.name for variant in variants])
    contenders = []
    for variant in variants:
        try:
            contenders.append(_contender(variant, search))
        except UsageError as error:
            problems.add(variant.name, error)
    problems.raise_if_any()
    return SearchPlan(sweep.name, search, tuple(contenders), final_seeds, sweep.origin)


def _can_be_set(variant: Variant, key: str, dimension: Dimension) -> bool:
    """Whether the setting exists, though it has no value: keywords of imported optimizers, and of parts of a model."""
    value = 1.0 if isinstance(dimension, Around) else dimension.low if isinstance(dimension, Range) else dimension[0]
    try:
        variant.resolve({key: value})
    except UsageError:
        return False
    return True


def _contender(variant: Variant, search: Search) -> Contender:
    contender = Contender(variant, search, variant.resolve({"seed": search.seed}))
    settings = flatten(contender.config.model_dump(mode="json"))
    for key, dimension in search.space.items():
        own = settings.get(key)
        if key not in settings and not _can_be_set(variant, key, dimension):
            nearest = difflib.get_close_matches(key, settings, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else "--print-config of asgo train lists them"
            raise UsageError(f"{variant.origin}: search.space: {key}: unknown setting; {hint}")
        if isinstance(dimension, Around) and dimension.middle(own) is None:
            found = "not set" if own is None else repr(own)
            other = "" if search.sampler == "grid" else ", or give { low, high } or a list"
            raise UsageError(
                f"{variant.origin}: search.space.{key}: its own value is {found}, but a geometric row needs a positive "
                f"float; add center = VALUE to the row{other}"
            )
    for extreme in contender.extremes():
        for key, end in extreme.items():
            if isinstance(search.space[key], Around) and end in (0.0, math.inf):
                raise UsageError(
                    f"{variant.origin}: search.space.{key}: so many trials with this factor exceed the float range"
                )
        contender.trial(0, extreme)
    return contender
