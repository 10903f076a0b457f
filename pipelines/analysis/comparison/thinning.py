"""Thin and smooth curves, and leave outliers out of a range."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.analysis.comparison.results import Array

Indices = npt.NDArray[np.intp]


def keep_spikes(values: Array, points: int) -> Indices:
    """Return the indices of at most `points` (4 or more) values to keep, ascending.

    Keeps the first, the last, and the lowest and highest of each of many sections of equal length.
    """
    count = len(values)
    if count <= points:
        return np.arange(count)
    length = -(-count // ((points - 2) // 2))
    sections = -(-count // length)
    # Padding with the last value changes no minimum or maximum, and argmin and argmax return the first index.
    padded = np.pad(values, (0, sections * length - count), mode="edge").reshape(sections, length)
    begins = np.arange(sections) * length
    return np.unique(np.concatenate([begins + padded.argmin(axis=1), begins + padded.argmax(axis=1), [0, count - 1]]))


def keep_evenly(steps: Array, last_step: int, points: int) -> Indices:
    """Return the indices of at most `points` of a curve's `steps` to keep, evenly spaced up to `last_step` of the run.

    Runs that record the same steps keep the same steps, also if they are unfinished.
    """
    if not len(steps):
        return np.arange(0)
    places = np.linspace(steps[0], last_step, points)
    return np.unique(np.searchsorted(steps, places, side="right") - 1)


def moving_mean(values: Array, half: int) -> Array:
    """Return the mean of each value and `half` on each side: fewer on both sides at the start, on one at the end."""
    sums: npt.NDArray[Any] = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    # Keep the window centred at the start, where losses fall fast: otherwise the mean is biased.
    reach = np.minimum(index, half)
    first, end = index - reach, np.minimum(index + reach + 1, len(values))
    means: Array = (sums[end] - sums[first]) / (end - first)
    return means


def without_outliers(low: float, highs: Sequence[float]) -> float:
    """Return the highest cost; if there are many, without outliers that would compress the rest of the scale."""
    middle = statistics.median(highs)
    return max(high for high in highs if len(highs) < 5 or high <= middle + 3 * (middle - low))
