"""Curves and results of a run, from the columns of its metrics."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.analysis.comparison.results import Array, Curve, State
from pipelines.analysis.comparison.thinning import Indices, keep_evenly, keep_spikes, moving_mean
from pipelines.tasks.metric import Metric
from pipelines.training.metrics import SPLITS, Split

Columns = dict[str, np.ndarray[Any, Any]]

_POINTS = 2000
_SMOOTHED_POINTS = 1000
_SMOOTHED = 0.04  # each point of the smoothed curve is a mean over this fraction of the run


@dataclass(frozen=True)
class Curves:
    """The curves of a run; see the fields of `Run` with these names."""

    train: Curve
    smoothed: Curve
    val: Curve
    best: float | None

    def final(self, state: State) -> float | None:
        """Return the last validation; None unless finished."""
        return float(self.val.values[-1]) if state == "finished" else None

    def final_train(self, state: State) -> float | None:
        """Return the mean training value at the end; None unless finished."""
        return float(self.smoothed.values[-1]) if state == "finished" and len(self.smoothed.values) else None


def curves_of(columns: Columns, metric: Metric, steps: float, recorded: float) -> Curves:
    """Return the curves of a run of `steps` steps, which records the training of `recorded` of them."""
    train, val = finite(curve_of(columns, "train", metric)), finite(curve_of(columns, "val", metric))
    means = replace(train, values=moving_mean(train.values, int(recorded * _SMOOTHED / 2)))
    return Curves(
        train=take(train, keep_spikes(train.values, _POINTS)),
        smoothed=take(means, keep_evenly(train.steps, int(steps), _SMOOTHED_POINTS)),
        val=val,
        best=metric.best(val.values.tolist()),
    )


def rows_of(columns: Columns, split: Split) -> npt.NDArray[np.intp]:
    """Return the rows of a split."""
    return np.flatnonzero(columns["split"] == SPLITS.index(split))


def curve_of(columns: Columns, split: Split, metric: Metric) -> Curve:
    """Return all values of a split, not finite ones included."""
    rows = rows_of(columns, split)
    names = ("step", "tokens", "elapsed_s", metric.name)
    return Curve(*(columns[name][rows].astype(np.float64) for name in names))


def finite(curve: Curve) -> Curve:
    """Drop values that are not finite: they would spoil the moving mean of their neighbours."""
    return take(curve, np.flatnonzero(np.isfinite(curve.values)))


def take(curve: Curve, kept: Indices) -> Curve:
    """Return the points with these indices."""
    return Curve(curve.steps[kept], curve.tokens[kept], curve.seconds[kept], curve.values[kept])


def last_validation(columns: Columns, metric: Metric) -> float | None:
    """Return the last validation by a metric; None if it is not recorded."""
    values = columns[metric.name][rows_of(columns, "val")]
    return float(values[-1]) if len(values) and np.isfinite(values[-1]) else None


def median(values: Array) -> float | None:
    """Return the median of the values that are recorded; None without any."""
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else None


def last_of_each_step(columns: Columns) -> Columns:
    """Return the rows sorted by step, only the last one per step and split: a resumed run repeats steps."""
    if not len(columns["step"]):
        return columns
    places = np.stack([columns["split"], columns["step"]])
    _, from_behind = np.unique(places[:, ::-1], axis=1, return_index=True)
    kept = np.sort(places.shape[1] - 1 - from_behind)
    kept = kept[np.argsort(columns["step"][kept], kind="stable")]
    return {name: column[kept] for name, column in columns.items()}


def is_no_better_than_untrained(val: Curve, steps: float) -> bool:
    """Return whether, after half of the steps or more, the loss is not below the untrained model's."""
    return (
        len(val.steps) > 0 and val.steps[0] == 0 and val.steps[-1] >= steps / 2 and not val.values[-1] < val.values[0]
    )


def worse_than_untrained(val: Curve) -> str:
    """Say how the last validation compares with that of the untrained model."""
    return f"validation loss {val.values[-1]:.4g} at step {val.steps[-1]:,.0f}, untrained {val.values[0]:.4g}"
