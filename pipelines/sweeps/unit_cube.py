"""Map numbers in a search space to the unit cube and back, and quasi-random points in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

Numbers = FloatDistribution | IntDistribution


def quasi_random(seed: int, number: int, space: Mapping[str, BaseDistribution]) -> dict[str, Any]:
    """Return the settings at a point, counted from 0, of a scrambled Halton sequence.

    Every prefix of the sequence fills the space evenly, so a search can be continued (Bousquet et al., arXiv
    1706.03200). optuna's sampler is not used: it takes its first point from elsewhere, and counts points in a way that
    two workers can take the same one.
    """
    from scipy.stats.qmc import Halton  # slow to import

    axes = sorted(space.items())  # the order in a user's file may change
    point = Halton(len(space), scramble=True, seed=np.random.default_rng(seed)).random(number + 1)[number]
    return {name: from_unit(float(at), each) for at, (name, each) in zip(point, axes, strict=True)}


def to_unit(value: float, distribution: Numbers) -> float:
    """Scale a value to [0, 1] in its range."""
    low, high = _ends(distribution)
    return (_scaled(value, distribution) - low) / (high - low)


def from_unit(fraction: float, distribution: BaseDistribution) -> Any:
    """Invert `to_unit`; round integers. For one of n values, each has an n-th of [0, 1]."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[min(int(fraction * len(distribution.choices)), len(distribution.choices) - 1)]
    assert isinstance(distribution, Numbers)
    low, high = _ends(distribution)
    value = low + fraction * (high - low)
    value = math.exp(value) if distribution.log else value
    value = round(value) if isinstance(distribution, IntDistribution) else value
    return min(max(value, distribution.low), distribution.high)


def _ends(distribution: Numbers) -> tuple[float, float]:
    """Return the scaled range; for integers half a unit wider on both sides, so that all are equally probable."""
    margin = 0.5 if isinstance(distribution, IntDistribution) else 0.0
    return _scaled(distribution.low - margin, distribution), _scaled(distribution.high + margin, distribution)


def _scaled(value: float, distribution: Numbers) -> float:
    return math.log(value) if distribution.log else value
