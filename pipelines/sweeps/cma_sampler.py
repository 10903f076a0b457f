"""A stateless CMA-ES sampler: it computes its state from the trials each time.

optuna's own sampler stores a pickle in the study: who can write the journal or database could execute code.
"""

from __future__ import annotations

from typing import Any

import cmaes
import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.search_space import IntersectionSearchSpace
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from pipelines.sweeps.unit_cube import Numbers, from_unit, to_unit

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
        return {name: each for name, each in space.items() if isinstance(each, Numbers) and not each.single()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if not search_space:
            return {}
        space = {name: each for name, each in search_space.items() if isinstance(each, Numbers)}
        dimensions = len(space)
        bounds = np.tile([0.0, 1.0], (dimensions, 1))
        cma = cmaes.CMA(np.full(dimensions, 0.5), _SIGMA, bounds, 10 * dimensions, self._seed)
        sign = -1 if study.direction == StudyDirection.MAXIMIZE else 1  # CMA minimizes
        points = [
            (np.array([to_unit(ended.params[name], each) for name, each in space.items()]), sign * ended.value)
            for ended in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            if ended.value is not None
        ]
        size = cma.population_size
        for start in range(0, len(points) - size + 1, size):
            cma.tell(points[start : start + size])
        point = zip(cma.ask().tolist(), space.items(), strict=True)
        return {name: from_unit(fraction, each) for fraction, (name, each) in point}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._random.sample_independent(study, trial, param_name, param_distribution)
