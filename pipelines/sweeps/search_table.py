"""The table `[search]` of a sweep file: number of trials, metric, sampler, pruner, and search space."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from pipelines.config import Seed, Settings
from pipelines.errors import UsageError

Value = bool | int | float | str
_VALUES: TypeAdapter[list[Value]] = TypeAdapter(list[Value])


class Around(Settings):
    """Geometric row of values around each contender's own value."""

    factor: float = Field(gt=1, le=100)
    points: int = Field(ge=3, le=99)

    @model_validator(mode="after")
    def _middle_is_own_value(self) -> Self:
        if self.points % 2 == 0:
            raise ValueError(f"points={self.points}: must be odd; each contender's own value is in the middle")
        return self

    def ends(self, own: float, beyond: int = 0) -> tuple[float, float]:
        """Return the lowest and the highest value, with `beyond` more values on both sides."""
        steps = self.points // 2 + beyond
        return self.value(own, -steps), self.value(own, steps)

    def value(self, own: float, position: float) -> float:
        """Return the value at a position; rounded to 12 digits, so that 0.01 · sqrt(10)² is 0.1."""
        try:
            return float(f"{own * self.factor**position:.12g}")
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
    """Exact number of trials per contender."""
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
    def _grid_is_one_row(self) -> Self:
        if self.sampler != "grid":
            return self
        rows = [dimension for dimension in self.space.values() if isinstance(dimension, Around)]
        if len(rows) != 1 or len(self.space) != 1:
            raise ValueError(
                'sampler = "grid" searches one setting, with factor and points; for more choose "tpe" or another'
            )
        if self.trials < rows[0].points:
            raise ValueError(f"trials={self.trials} is less than the grid's points={rows[0].points}")
        return self


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
            problems += _lines(error, place)
        except UsageError as error:
            problems.append(f"{place}: {error}")
    if "seed" in space:
        problems.append("search.space.seed: all trials have the seed of [search]")
    if not problems:
        try:
            return Search.model_validate({**table, "space": space})
        except ValidationError as error:
            problems = list(_lines(error, "search"))
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


def _lines(error: ValidationError, place: str) -> Iterable[str]:
    for details in error.errors():
        where = ".".join([place, *map(str, details["loc"])])
        message = details["msg"].removeprefix("Input ").removeprefix("Value error, ")
        if details["type"] == "missing":
            yield f"{where} is missing"
        elif details["type"] == "extra_forbidden":
            yield f"{where}: unknown key"
        elif details["type"] == "value_error":
            yield f"{where}: {message}"
        else:
            yield f"{where} = {details['input']!r}: {message}"
