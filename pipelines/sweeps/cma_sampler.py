"""A stateless CMA-ES sampler: it computes its state from the trials each time.

optuna's own sampler stores a pickle in the study: who can write the journal or database could execute code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import cmaes
import numpy as np
from numpy.typing import NDArray
from optuna import Study
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.search_space import IntersectionSearchSpace
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

_Numbers = FloatDistribution | IntDistribution
_SIGMA = 1 / 6
"""Initial standard deviation, as a fraction of each range."""


class CmaSampler(BaseSampler):
    """Samples numbers with CMA-ES; the first trial and categorical settings are random.

    Finished trials are grouped into generations in the order of their numbers. With several workers, trials end in
    another order, so a generation may contain trials that were sampled for the previous one.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._random = RandomSampler(seed)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        space = IntersectionSearchSpace().calculate(study)
        return {name: each for name, each in space.items() if isinstance(each, _Numbers) and not each.single()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if not search_space:
            return {}
        space = {name: each for name, each in search_space.items() if isinstance(each, _Numbers)}
        dimensions = len(space)
        bounds = np.tile([0.0, 1.0], (dimensions, 1))
        cma = cmaes.CMA(np.full(dimensions, 0.5), _SIGMA, bounds, 10 * dimensions, self._seed)
        sign = -1 if study.direction == StudyDirection.MAXIMIZE else 1  # CMA minimizes
        points = [
            (_to_unit(ended.params, space), sign * ended.value)
            for ended in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            if ended.value is not None
        ]
        size = cma.population_size
        for start in range(0, len(points) - size + 1, size):
            cma.tell(points[start : start + size])
        return _from_unit(cma.ask(), space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._random.sample_independent(study, trial, param_name, param_distribution)


def _to_unit(params: Mapping[str, Any], space: Mapping[str, _Numbers]) -> NDArray[np.float64]:
    """Scale values to [0, 1] in their ranges; shape (settings,)."""
    scaled = []
    for name, distribution in space.items():
        low, high = _ends(distribution)
        scaled.append((_scaled(params[name], distribution) - low) / (high - low))
    return np.array(scaled)


def _from_unit(point: NDArray[np.float64], space: Mapping[str, _Numbers]) -> dict[str, Any]:
    """Invert `_to_unit`; round integer settings."""
    params = {}
    for fraction, (name, distribution) in zip(point.tolist(), space.items(), strict=True):
        low, high = _ends(distribution)
        value = low + fraction * (high - low)
        value = math.exp(value) if distribution.log else value
        value = round(value) if isinstance(distribution, IntDistribution) else value
        params[name] = min(max(value, distribution.low), distribution.high)
    return params


def _ends(distribution: _Numbers) -> tuple[float, float]:
    """Return the scaled range; for integers half a unit wider on both sides, so that all are equally probable."""
    margin = 0.5 if isinstance(distribution, IntDistribution) else 0.0
    return _scaled(distribution.low - margin, distribution), _scaled(distribution.high + margin, distribution)


def _scaled(value: float, distribution: _Numbers) -> float:
    return math.log(value) if distribution.log else value
