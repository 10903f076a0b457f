"""A sweep's file: common settings, a list of runs, a grid, seeds and a search, and the configurations they make."""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from pipelines.config import RunConfig, flatten
from pipelines.errors import UsageError
from pipelines.gpt2.initial_model import resolve_with_initial_model
from pipelines.resolve import Layer, file_layer, preset_layer, preset_names
from pipelines.sweeps.search_table import Search, read_search
from pipelines.tasks import TASKS, task_of

_SHIPPED = resources.files("pipelines") / "presets" / "sweeps"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_MOST_RUNS = 10_000


@dataclass(frozen=True)
class SweepRun:
    """One training run of a sweep."""

    name: str
    """Of its folder: the variant's, and the seed."""
    variant: str
    """Common to the seeds."""
    config: RunConfig

    @property
    def samples(self) -> int:
        """Sequences (or images) that it trains on."""
        return self.config.training.steps * self.config.training.batch_size

    @property
    def tokens_per_sample(self) -> int:
        """The context's length; 1 for an image."""
        return task_of(self.config).units_per_sample(self.config)


@dataclass(frozen=True)
class Sweep:
    """What the file says, each setting by its dotted key."""

    name: str
    origin: str
    """Where it was read, for messages."""
    task: str
    preset: str
    common: dict[str, Any] = field(default_factory=dict)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    search: Search | None = None


@dataclass(frozen=True)
class Variant:
    """A run before its seed; in a search, a contender."""

    name: str
    settings: dict[str, Any]
    origin: str
    base: tuple[Layer, ...] = ()
    """What is common to all."""

    def resolve(self, settings: Mapping[str, Any]) -> RunConfig:
        """The configuration with `settings` on top of its own. Raises `UsageError` like `pipelines.resolve.resolve`."""
        return resolve_with_initial_model([*self.base, Layer(self.origin, {**self.settings, **settings})])


class Problems:
    """Lines about runs, each told once with the names of the runs it is about."""

    def __init__(self, names: Sequence[str]) -> None:
        self._all = list(names)
        self._names: dict[str, list[str]] = {}

    def add(self, name: str, error: Exception) -> None:
        """Record every line of an error that a run has."""
        for line in str(error).splitlines():
            names = self._names.setdefault(line, [])
            if name not in names:
                names.append(name)

    def raise_if_any(self) -> None:
        """`UsageError` with all lines."""
        if self._names:
            raise UsageError("\n".join(self._worded(line, names) for line, names in self._names.items()))

    def _worded(self, line: str, names: list[str]) -> str:
        if len(names) == len(self._all):
            return line
        return f"run{'s' * (len(names) > 1)} {', '.join(names)}: {line}"


def sweep_names() -> list[str]:
    """The sweeps that are shipped, by name."""
    return sorted(Path(entry.name).stem for entry in _SHIPPED.iterdir() if entry.name.endswith(".toml"))


def read_sweep(source: str) -> Sweep:
    """A shipped sweep by its name, or a TOML file; `UsageError` with a line for everything that is wrong in it."""
    if not source.endswith(".toml"):
        if source not in sweep_names():
            nearest = difflib.get_close_matches(source, sweep_names(), n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(sweep_names())}"
            raise UsageError(f"unknown sweep {source!r}; {hint} or give a FILE.toml")
        with resources.as_file(_SHIPPED / f"{source}.toml") as path:
            return _sweep_of(source, f"sweep {source}", file_layer(path).values)
    return _sweep_of(Path(source).stem, source, file_layer(Path(source)).values)


def resolve_runs(sweep: Sweep, set_layer: Layer, seeds: Sequence[int] = ()) -> list[SweepRun]:
    """Every run's configuration, as `asgo train` makes it: preset, file, --set, then the run's own settings.

    Without `seeds` and seeds in the file, each has its preset's. Raises `UsageError` with a line for every problem of
    any run, named where not all have it.
    """
    variants = resolve_variants(sweep, set_layer)
    runs, problems = [], Problems([variant.name for variant in variants])
    # The first seed of every variant comes before the second of any: what is there early can be compared.
    for seed, variant in itertools.product(tuple(seeds) or sweep.seeds or (None,), variants):
        try:
            config = variant.resolve({} if seed is None else {"seed": seed})
        except UsageError as error:
            problems.add(variant.name, error)
        else:
            runs.append(SweepRun(f"{variant.name}-s{config.seed}", variant.name, config))
    problems.raise_if_any()
    return runs


def resolve_variants(sweep: Sweep, set_layer: Layer) -> list[Variant]:
    """The list, at each point of the grid. Raises `UsageError` for a --set that would make their names untrue."""
    base = (preset_layer(sweep.task, sweep.preset), Layer(sweep.origin, sweep.common), set_layer)
    variants = _variants(sweep, base)
    _refuse_to_overrule(variants, set_layer)
    return variants


def _sweep_of(name: str, origin: str, values: Mapping[str, Any]) -> Sweep:
    common = {
        key: value for key, value in values.items() if key.split(".")[0] not in ("runs", "grid", "seeds", "search")
    }
    grid = {key.removeprefix("grid."): value for key, value in values.items() if key.startswith("grid.")}
    runs, problems = _named_runs(values.get("runs", []))
    seeds = values.get("seeds", [])
    task, preset = common.pop("task", None), common.pop("preset", None)
    if task not in TASKS:
        choices = " or ".join(f'task = "{name}"' for name in TASKS)
        problems.append(f"task is {task!r}: write {choices}")
    elif preset not in preset_names(task):
        problems.append(f"preset is {preset!r}: the runs begin with one of {', '.join(preset_names(task))}")
    if not isinstance(seeds, list) or not all(type(seed) is int and 0 <= seed < 2**64 for seed in seeds):
        problems.append(f"seeds is {seeds!r}: write it as a list of whole numbers, such as seeds = [1, 2, 3]")
    problems += _shape_problems(values, grid)
    problems += _misplaced_seeds(common, grid, runs)
    search = None
    try:
        search = _search_of(values)
    except UsageError as error:
        problems += str(error).splitlines()
    if problems:
        raise UsageError("\n".join(f"{origin}: {line}" for line in problems))
    return Sweep(name, origin, str(task), str(preset), common, runs, grid, tuple(dict.fromkeys(seeds)), search)


def _search_of(values: Mapping[str, Any]) -> Search | None:
    if "search" in values:
        raise UsageError("search: should be a table, under a line [search]")
    table = {key.removeprefix("search."): value for key, value in values.items() if key.startswith("search.")}
    return read_search(table) if table else None


def _named_runs(tables: Any) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The settings of each run by its name, and a line for every table that has no good one."""
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        return {}, ["runs should be tables, each under a line [[runs]]"]
    runs: dict[str, dict[str, Any]] = {}
    problems = []
    for number, table in enumerate(tables, 1):
        name = table.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            problems.append(f"run {number}: name is {name!r}: give it one of letters, digits, dots, - and _")
        elif name in runs:
            problems.append(f"run {number}: there is a run named {name!r} already")
        else:
            runs[name] = flatten({key: value for key, value in table.items() if key != "name"})
    return runs, problems


def _shape_problems(values: Mapping[str, Any], grid: Mapping[str, Any]) -> list[str]:
    """A line for everything that is no list of runs, no grid, or neither of them."""
    problems = [
        f"grid: {key} is {points!r}: should be a list of numbers, texts or lists"
        for key, points in grid.items()
        if not isinstance(points, list) or not points or any(isinstance(point, dict) for point in points)
    ]
    problems += [
        f"{key}: runs are tables under [[runs]] each, grid is a table of lists, and seeds a list"
        for key in values
        if key == "grid" or key.startswith(("runs.", "seeds."))
    ]
    if not values.get("runs") and not grid:
        problems.append("nothing to run: add [[runs]] with a name and settings each, or a [grid] with lists of values")
    return problems


def _misplaced_seeds(common: Mapping[str, Any], grid: Mapping[str, Any], runs: Mapping[str, Any]) -> list[str]:
    places = {"file": common, "grid": grid, **{f"run {name}": settings for name, settings in runs.items()}}
    return [
        f"{place}: seed: list them for all runs, as in seeds = [1, 2, 3]" for place in places if "seed" in places[place]
    ]


def _variants(sweep: Sweep, base: tuple[Layer, ...]) -> list[Variant]:
    """Each run, or the common settings where there is no list, at each point of the grid."""
    count = len(sweep.runs or " ") * math.prod(map(len, sweep.grid.values()))
    if count > _MOST_RUNS:
        raise UsageError(f"{sweep.origin}: grid: makes {count:,} runs; {_MOST_RUNS:,} are the most")
    points = [dict(zip(sweep.grid, values, strict=True)) for values in itertools.product(*sweep.grid.values())]
    variants = []
    problems = []
    for name, settings in (sweep.runs or {"": {}}).items():
        problems += [f"run {name}: {key} is set, and varied by the grid too" for key in settings if key in sweep.grid]
        for point in points:
            parts = [name, *(_short(key, value) for key, value in point.items())]
            variants.append(Variant("-".join(filter(None, parts)), {**settings, **point}, sweep.origin, base))
    names = [variant.name for variant in variants]
    problems += [f"two runs are named {name}" for name in dict.fromkeys(names) if names.count(name) > 1]
    if problems:
        raise UsageError("\n".join(f"{sweep.origin}: {line}" for line in problems))
    return variants


def _short(key: str, value: Any) -> str:
    """A setting as a part of a folder's name: `lr0.001`, or the optimizer's name alone."""
    label = "" if key == "optimizer.name" else key.split(".")[-1]
    text = "_".join(map(str, value)) if isinstance(value, list) else str(value)
    return label + re.sub(r"[^A-Za-z0-9.-]+", "_", text)


def _refuse_to_overrule(variants: Sequence[Variant], set_layer: Layer) -> None:
    """`UsageError` for a --set of what the runs differ in, which would make their names untrue."""
    problems = []
    for key in set_layer.values:
        takers = [variant.name for variant in variants if key in variant.settings]
        if key == "seed":
            problems.append("--set seed: give --seeds 1,2,3")
        elif takers:
            problems.append(
                f"--set {key}: set for each run by the sweep ({', '.join(takers)}); copy its file and change it"
            )
    if problems:
        raise UsageError("\n".join(problems))
