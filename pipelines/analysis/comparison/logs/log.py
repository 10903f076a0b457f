"""A run as a log of another program describes it, and the columns of its metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.tasks.metric import METRICS
from pipelines.training.metrics import SPLITS, Split

Columns = dict[str, np.ndarray[Any, Any]]
Series = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]
"""Steps and values of one quantity."""
Place = tuple[Split | None, str]
"""A quantity of a split, or of all."""

PROGRESS = ("tokens", "elapsed_s", "step_ms", "optimizer_ms")
"""Quantities of a step, whatever its split."""


@dataclass(frozen=True)
class Log:
    """One run of a log. What the log does not say is None or NaN."""

    name: str
    """Its name in the log; empty if the log has only this run."""
    contender: str
    """Empty if only the path of the log names it."""
    seed: int | None
    columns: Columns
    """`split` (index in `SPLITS`), `step`, the metrics and `PROGRESS`, as arrays of equal length in the log's order."""
    steps: int | None = None
    """Length of the whole run."""
    reached: int = 0
    """A step that was made, though not recorded."""


def columns_of(series: Mapping[Place, Series]) -> Columns:
    """Return the columns of the quantities of each split, and of `PROGRESS`, whose split is None.

    A split has the rows of its first metric. The value of another is that at the same step, and progress is that of the
    last record at or before the step.
    """
    parts = [part for split in SPLITS if (part := _part(split, series)) is not None]
    names = ("split", "step", *METRICS, *PROGRESS)
    return {name: np.concatenate([part[name] for part in parts] or [np.empty(0)]) for name in names}


def _part(split: Split, series: Mapping[Place, Series]) -> Columns | None:
    """Return the columns of one split; None if it has no metric."""
    found = {name: series[split, name] for name in METRICS if (split, name) in series}
    if not found:
        return None
    steps = next(iter(found.values()))[0]
    columns = {"split": np.full(len(steps), SPLITS.index(split)), "step": steps}
    for name in METRICS:
        columns[name] = _at(steps, found.get(name), exactly=True)
    for name in PROGRESS:
        columns[name] = _at(steps, series.get((None, name)), exactly=False)
    return columns


def _at(steps: npt.NDArray[np.float64], series: Series | None, *, exactly: bool) -> npt.NDArray[np.float64]:
    """Return the values at the steps, or else at the last step before, if not `exactly`; NaN where there is none."""
    if series is None or not len(series[0]):
        return np.full(len(steps), np.nan)
    its_steps, values = series
    if np.array_equal(its_steps, steps):
        return values
    order = np.argsort(its_steps, kind="stable")
    places = np.searchsorted(its_steps[order], steps, side="right") - 1
    known = places >= 0
    if exactly:
        known &= its_steps[order][places] == steps
    return np.where(known, values[order][places], np.nan)
