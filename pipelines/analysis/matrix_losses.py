"""Losses of optimizers on matrix problems."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from models.matrix_problems import PROBLEMS, MatrixProblem
from pipelines.analysis.descent import descend, first_for_good
from pipelines.analysis.optimizer_settings import OptimizerSettings

SHARE = 1e-3  # a run has solved a problem if its loss stays below this fraction of the first


@dataclass(frozen=True)
class LossRun:
    """Losses of an optimizer over `steps` steps: `values` is `(steps + 1,)`.

    A run that diverges is shorter: it ends before the first loss that is not finite, and `diverged_at` is the step
    that led there.
    """

    problem: MatrixProblem
    settings: OptimizerSettings
    steps: int
    values: npt.NDArray[np.float64] = field(repr=False)
    diverged_at: int | None = None

    @property
    def steps_to_reach(self) -> int | None:
        """The first step from which the loss stays below `SHARE` of the first to the end; `None` if it does not."""
        return None if self.diverged_at is not None else first_for_good(self.values < SHARE * self.values[0])


def choose_problems(names: Sequence[str]) -> list[MatrixProblem]:
    """Return the problems of these names."""
    return [PROBLEMS[name] for name in names]


def run_losses(
    problem: MatrixProblem,
    settings: Sequence[OptimizerSettings],
    steps: int | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[LossRun]:
    """Run each setting on the problem that the seed generates, in double precision.

    `progress` is called with the number of steps since its last call.
    """
    steps = steps or problem.steps
    instance = problem.make(seed)
    stacks = [start.expand(len(settings), *start.shape).clone() for start in instance.start]
    values = torch.stack(list(descend(instance.loss, stacks, settings, steps, progress=progress)), dim=1).numpy()
    return [_finite_part(problem, setting, steps, row) for setting, row in zip(settings, values, strict=True)]


def _finite_part(
    problem: MatrixProblem, settings: OptimizerSettings, steps: int, values: npt.NDArray[np.float64]
) -> LossRun:
    not_finite = np.flatnonzero(~np.isfinite(values)).tolist()
    end = not_finite[0] if not_finite else None
    return LossRun(problem, settings, steps, values[:end], diverged_at=end)
