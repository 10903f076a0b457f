"""Fewer points of a curve: for display with every spike, or smoothed."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.analysis.comparison.results import Array

Indices = npt.NDArray[np.intp]


def keep_spikes(values: Array, points: int) -> Indices:
    """Which values to keep, ascending, at most `points` of them (4 or more).

    The first, the last, and the lowest and the highest of each of many stretches of equal length.
    """
    count = len(values)
    if count <= points:
        return np.arange(count)
    length = -(-count // ((points - 2) // 2))
    stretches = -(-count // length)
    # Repeating the last value changes no minimum or maximum, and its first place is the true one.
    padded = np.pad(values, (0, stretches * length - count), mode="edge").reshape(stretches, length)
    begins = np.arange(stretches) * length
    return np.unique(np.concatenate([begins + padded.argmin(axis=1), begins + padded.argmax(axis=1), [0, count - 1]]))


def keep_evenly(steps: Array, last_step: int, points: int) -> Indices:
    """Which of a curve's `steps` to keep: at most `points`, from the first to `last_step`, where the run shall end.

    Runs that record at the same steps keep the same ones, however far each has come.
    """
    if not len(steps):
        return np.arange(0)
    places = np.linspace(steps[0], last_step, points)
    return np.unique(np.searchsorted(steps, places, side="right") - 1)


def moving_mean(values: Array, half: int) -> Array:
    """The mean of each value and the `half` before and after it; at the beginning of fewer, as many on both sides."""
    sums: npt.NDArray[Any] = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(index, half)  # where the loss falls fast, a window that is not centred would mislead
    first, end = index - reach, np.minimum(index + reach + 1, len(values))
    means: Array = (sums[end] - sums[first]) / (end - first)
    return means
