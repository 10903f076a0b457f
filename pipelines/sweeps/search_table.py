"""The table `[search]` of a sweep file: number of trials, metric, sampler, pruner, and search space."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from pipelines.config import Count, Seed, Settings
from pipelines.errors import UsageError
from pipelines.settings_file import validation_lines
from pipelines.steps import LENGTHS

Value = bool | int | float | str
_VALUES: TypeAdapter[list[Value]] = TypeAdapter(list[Value])


class Around(Settings):
    """Geometric row of values around each contender's own value, or around `center`."""

    factor: float = Field(gt=1, le=100)
    points: int = Field(ge=3, le=99)
    center: float | None = Field(None, gt=0)
    """Middle of the row for all contenders, such as a weight decay that some do not have."""

    @model_validator(mode="after")
    def _middle_is_own_value(self) -> Self:
        if self.points % 2 == 0:
            raise ValueError(f"points={self.points}: must be odd; each contender's own value is in the middle")
        return self

    def middle(self, own: Any) -> float | None:
        """Return the value in the middle; None if a contender's own value cannot be it."""
        if self.center is not None:
            return self.center
        return own if isinstance(own, float) and own > 0 else None

    def ends(self, own: Any, beyond: int = 0) -> tuple[float, float]:
        """Return the lowest and the highest value, with `beyond` more values on both sides."""
        steps = self.points // 2 + beyond
        return self.value(own, -steps), self.value(own, steps)

    def value(self, own: Any, position: float) -> float:
        """Return the value at a position; rounded to 12 digits, so that 0.01 · sqrt(10)² is 0.1."""
        middle = self.middle(own)
        assert middle is not None
        try:
            return float(f"{middle * self.factor**position:.12g}")
        except OverflowError:
            return math.inf


class Range(Settings):
    """Range of values."""

    low: int | float
    high: int | float
    log: bool = False

    @model_validator(mode="after")
    def _ends_are_ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low={self.low} is not below high={self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"low={self.low}: must be above 0 with log = true")
        return self


Dimension = Around | Range | tuple[Value, ...]


class Search(Settings):
    """Settings of a search, equal for all contenders."""

    trials: int = Field(ge=1, le=999)
    """Exact number of trials per contender. A search that was begun with fewer continues."""
    steps: Count | None = None
    """Steps of a trial, if a final run has more."""
    sampler: Literal["grid", "tpe", "random", "gp", "cmaes", "qmc"] = "grid"
    pruner: Literal["none", "median", "hyperband", "successive-halving"] = "none"
    metric: Literal["loss", "accuracy"] = "loss"
    """What the best settings are chosen by, at the last validation."""
    seed: Seed = 0
    """Seed of the trials and of the sampler; not allowed for final runs."""
    storage: str | None = None
    """URL of a database, or a journal FILE.log; a journal in the sweep's folder if absent."""
    space: dict[str, Dimension] = Field(min_length=1)
    """Searched settings, by dotted key."""

    @model_validator(mode="after")
    def _grid_has_rows(self) -> Self:
        if self.sampler != "grid":
            return self
        if len(self.rows) != len(self.space):
            raise ValueError('sampler = "grid" needs factor and points for each setting; else choose "qmc" or another')
        points = math.prod(row.points for row in self.rows.values())
        if self.trials < points:
            raise ValueError(f"trials={self.trials} is less than the grid's points={points}")
        return self

    @model_validator(mode="after")
    def _trials_have_one_length(self) -> Self:
        lengths = [key for key in self.space if key in LENGTHS]
        if self.steps is not None and lengths:
            raise ValueError(f"steps={self.steps} is the length of all trials; remove it, or {lengths[0]} in the space")
        return self

    @property
    def rows(self) -> dict[str, Around]:
        """The settings that have a geometric row, sorted: positions are stored, and the file's order may change."""
        return {key: dimension for key, dimension in sorted(self.space.items()) if isinstance(dimension, Around)}


def read_search(values: Mapping[str, Any]) -> Search:
    """Parse the table from settings by dotted key. Raises `UsageError` with one line for each problem."""
    table: dict[str, Any] = {key: value for key, value in values.items() if not key.startswith("space.")}
    problems: list[str] = []
    space: dict[str, Dimension] = {}
    for setting, written in _settings(values).items():
        place = f"search.space.{setting}"
        try:
            space[setting] = _dimension(written)
        except ValidationError as error:
            problems += validation_lines(error, place)
        except UsageError as error:
            problems.append(f"{place}: {error}")
    if "seed" in space:
        problems.append("search.space.seed: all trials have the seed of [search]")
    if not problems:
        try:
            return Search.model_validate({**table, "space": space})
        except ValidationError as error:
            problems = list(validation_lines(error, "search"))
    raise UsageError("\n".join(problems))


def _settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the value of each setting of the space: a list, or a table."""
    lists: dict[str, Any] = {}
    tables: dict[str, Any] = {}
    for key, value in values.items():
        if not key.startswith("space."):
            continue
        setting = key.removeprefix("space.")
        if isinstance(value, list):
            lists[setting] = value
        else:
            setting, _, part = setting.rpartition(".")
            tables.setdefault(setting, {})[part] = value
    return {**tables, **lists}


def _dimension(written: Any) -> Dimension:
    if isinstance(written, list):
        if not written or not all(isinstance(value, Value) for value in written):
            raise UsageError(f"{written!r}: should be a list of numbers or texts")
        return tuple(_VALUES.validate_python(written))
    if written.keys() & Around.model_fields.keys():
        return Around.model_validate(written)
    if written.keys() & Range.model_fields.keys():
        return Range.model_validate(written)
    raise UsageError("write { factor, points }, { low, high } or a list of values")
