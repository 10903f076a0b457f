"""Read a sweep file (common settings, runs, grid, seeds, search) and resolve its configurations."""

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

from pipelines.config import RunConfig, flatten, task_name
from pipelines.errors import UsageError
from pipelines.optimizers import short_key
from pipelines.resolve import Layer, file_layer, preset_layer, preset_names
from pipelines.steps import alternatives_of, resolve_run
from pipelines.sweeps.search_table import Search, read_search
from pipelines.tasks import TASKS, task_of

_SHIPPED = resources.files("pipelines") / "presets" / "sweeps"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_MOST_RUNS = 10_000
_LONGEST_NAME = 200
"""A folder's name has at most 255 bytes, and ends with the seed."""
_OWN = ("runs", "grid", "seeds", "search")
"""Keys of a sweep; all others are settings of its runs."""


@dataclass(frozen=True)
class SweepRun:
    """One training run of a sweep."""

    name: str
    """Name of its folder: variant and seed."""
    variant: str
    """Name of the variant, without the seed."""
    config: RunConfig

    @property
    def samples(self) -> int:
        """Number of sequences (or images) that it trains on."""
        return self.config.training.steps * self.config.training.batch_size

    @property
    def tokens_per_sample(self) -> int:
        """Context length; 1 for an image."""
        return task_of(self.config).units_per_sample(self.config)


@dataclass(frozen=True)
class Sweep:
    """Content of a sweep file; settings by dotted key."""

    name: str
    origin: str
    """Source for messages: path or name."""
    task: str
    preset: str
    common: dict[str, Any] = field(default_factory=dict)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    search: Search | None = None


@dataclass(frozen=True)
class Variant:
    """A run without its seed; in a search, a contender."""

    name: str
    settings: dict[str, Any]
    origin: str
    base: tuple[Layer, ...] = ()
    """Layers that all variants have."""

    def resolve(self, settings: Mapping[str, Any]) -> RunConfig:
        """Resolve the configuration; `settings` override its own. Raises like `resolve_run`."""
        return resolve_run([*self.base, Layer(self.origin, {**self.settings, **settings})])


class Problems:
    """Error lines of runs. Reports each line once, with the names of its runs."""

    def __init__(self, names: Sequence[str]) -> None:
        self._all = list(names)
        self._names: dict[str, list[str]] = {}

    def add(self, name: str, error: Exception) -> None:
        """Add every line of a run's error."""
        for line in str(error).splitlines():
            names = self._names.setdefault(line, [])
            if name not in names:
                names.append(name)

    def raise_if_any(self) -> None:
        """Raise `UsageError` with all lines, if there are any."""
        if self._names:
            raise UsageError("\n".join(self._with_names(line, names) for line, names in self._names.items()))

    def _with_names(self, line: str, names: list[str]) -> str:
        if len(names) == len(self._all):
            return line
        return f"run{'s' * (len(names) > 1)} {', '.join(names)}: {line}"


def sweep_names() -> list[str]:
    """Return the names of the shipped sweeps."""
    return sorted(Path(entry.name).stem for entry in _SHIPPED.iterdir() if entry.name.endswith(".toml"))


def shipped_file(name: str) -> Path:
    """Return the file of a shipped sweep."""
    return Path(str(_SHIPPED / f"{name}.toml"))


def read_sweep(source: str) -> Sweep:
    """Read a shipped sweep by name, or a TOML file. Raises `UsageError` with one line for each problem."""
    if not source.endswith(".toml"):
        if source not in sweep_names():
            nearest = difflib.get_close_matches(source, sweep_names(), n=1)
            known = f"known: {', '.join(sweep_names())}; or give a FILE.toml"
            raise UsageError(f"unknown sweep {source!r}; {f'did you mean {nearest[0]!r}?' if nearest else known}")
        with resources.as_file(_SHIPPED / f"{source}.toml") as path:
            return _sweep_of(source, f"sweep {source}", file_layer(path).values)
    return _sweep_of(Path(source).stem, source, file_layer(Path(source)).values)


def resolve_runs(sweep: Sweep, set_layer: Layer, seeds: Sequence[int] = ()) -> list[SweepRun]:
    """Resolve the configuration of every run: preset, file, --set, then the run's own settings.

    Without `seeds` and without seeds in the file, runs have the preset's seed. Raises `UsageError` with one line for
    each problem, with the names of the runs unless all have it.
    """
    variants = resolve_variants(sweep, set_layer)
    runs, problems = [], Problems([variant.name for variant in variants])
    # The first seed of every variant comes before the second of any, so that early results are comparable.
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
    """Return each run at each point of the grid. Raises `UsageError` if --set contradicts the names of variants."""
    base = (preset_layer(sweep.task, sweep.preset), Layer(sweep.origin, sweep.common), set_layer)
    variants = _variants(sweep, base)
    _refuse_to_overrule(variants, set_layer)
    return variants


def _sweep_of(name: str, origin: str, values: Mapping[str, Any]) -> Sweep:
    common = {key: value for key, value in values.items() if key.split(".")[0] not in _OWN}
    grid = {key.removeprefix("grid."): value for key, value in values.items() if key.startswith("grid.")}
    runs, problems = _named_runs(values.get("runs", []))
    seeds = values.get("seeds", [])
    task, preset = task_name(common.pop("task", None)), common.pop("preset", None)
    if task not in TASKS:
        choices = " or ".join(f'task = "{name}"' for name in TASKS)
        problems.append(f"task is {task!r}: write {choices}")
    elif preset not in preset_names(task):
        problems.append(f"preset is {preset!r}: choose one of {', '.join(preset_names(task))}")
    if not isinstance(seeds, list) or not all(type(seed) is int and 0 <= seed < 2**64 for seed in seeds):
        problems.append(f"seeds is {seeds!r}: write it as a list of whole numbers, such as seeds = [1, 2, 3]")
    problems += _misspelt(common) or _shape_problems(values, grid)
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
    """Return the settings of each run by name, and one line for each table without a valid name."""
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        return {}, ["runs should be tables, each under a line [[runs]]"]
    runs: dict[str, dict[str, Any]] = {}
    problems = []
    for number, table in enumerate(tables, 1):
        name = table.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            problems.append(f"run {number}: name is {name!r}: use letters, digits, dots, - and _")
        elif name in runs:
            problems.append(f"run {number}: another run already has the name {name!r}")
        else:
            runs[name] = flatten({key: value for key, value in table.items() if key != "name"})
    return runs, problems


def _misspelt(common: Mapping[str, Any]) -> list[str]:
    """Return one line for each key that is no setting of a run, but nearly a key of a sweep."""
    heads = dict.fromkeys(key.split(".")[0] for key in common)
    nearest = {head: difflib.get_close_matches(head, _OWN, n=1) for head in heads if head not in RunConfig.model_fields}
    return [f"{head}: unknown key; did you mean {near[0]!r}?" for head, near in nearest.items() if near]


def _shape_problems(values: Mapping[str, Any], grid: Mapping[str, Any]) -> list[str]:
    """Return one line for each value of the wrong type in runs, grid and seeds, and one if there is nothing to run."""
    problems = [
        f"grid: {key} is {points!r}: should be a list of numbers, texts or lists"
        for key, points in grid.items()
        if not isinstance(points, list) or not points or any(isinstance(point, dict) for point in points)
    ]
    problems += [
        f"{key}: write runs as tables [[runs]], grid as a table of lists, and seeds as a list"
        for key in values
        if key == "grid" or key.startswith(("runs.", "seeds."))
    ]
    if not values.get("runs") and not grid:
        problems.append(
            "nothing to run: add tables [[runs]] with a name and settings, or a [grid] with lists of values"
        )
    return problems


def _misplaced_seeds(common: Mapping[str, Any], grid: Mapping[str, Any], runs: Mapping[str, Any]) -> list[str]:
    places = {"file": common, "grid": grid, **{f"run {name}": settings for name, settings in runs.items()}}
    return [
        f"{place}: seed: list them for all runs, as in seeds = [1, 2, 3]" for place in places if "seed" in places[place]
    ]


def _variants(sweep: Sweep, base: tuple[Layer, ...]) -> list[Variant]:
    """Return each run (or the common settings, if there are no runs) at each point of the grid."""
    count = len(sweep.runs or " ") * math.prod(map(len, sweep.grid.values()))
    if count > _MOST_RUNS:
        raise UsageError(f"{sweep.origin}: grid: makes {count:,} runs; the maximum is {_MOST_RUNS:,}")
    points = [dict(zip(sweep.grid, values, strict=True)) for values in itertools.product(*sweep.grid.values())]
    variants = []
    problems = []
    for name, settings in (sweep.runs or {"": {}}).items():
        problems += [f"run {name}: {key} is set, but the grid varies it" for key in settings if key in sweep.grid]
        for point in points:
            parts = [name, *(_short(key, value) for key, value in point.items())]
            variants.append(Variant("-".join(filter(None, parts)), {**settings, **point}, sweep.origin, base))
    names = [variant.name for variant in variants]
    problems += [
        f"run {name[:40]}...: the name has {len(name)} characters; the maximum is {_LONGEST_NAME}"
        for name in names
        if len(name) > _LONGEST_NAME
    ]
    problems += [f"two runs have the name {name}" for name in dict.fromkeys(names) if names.count(name) > 1]
    if problems:
        raise UsageError("\n".join(f"{sweep.origin}: {line}" for line in problems))
    return variants


def _short(key: str, value: Any) -> str:
    """Return a setting as a part of a folder name: `lr0.001`, or the optimizer's name alone."""
    label = "" if key == "optimizer.name" else short_key(key)
    text = "_".join(map(str, value)) if isinstance(value, list) else str(value)
    return label + re.sub(r"[^A-Za-z0-9.-]+", "_", text).strip("._")  # ./FILE.py:Class must not be a hidden folder


def _refuse_to_overrule(variants: Sequence[Variant], set_layer: Layer) -> None:
    """Raise `UsageError` if --set changes a setting in which runs differ: their names would be wrong."""
    problems = []
    for key in set_layer.values:
        keys = alternatives_of(key)
        owners = [variant.name for variant in variants if not variant.settings.keys().isdisjoint(keys)]
        if key == "seed":
            problems.append("--set seed: give --seeds 1,2,3")
        elif owners:
            problems.append(
                f"--set {key}: the sweep sets it for each run ({', '.join(owners)}); change it in a copy of the file"
            )
    if problems:
        raise UsageError("\n".join(problems))
