"""Trajectories of optimizers on two-dimensional test functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.expression import expression_function
from models.functions import FUNCTIONS, Point
from models.functions import TestFunction as TestFunction  # re-exported for asgo_cli, which must not import models
from pipelines.analysis.descent import descend, first_for_good
from pipelines.analysis.optimizer_settings import OptimizerSettings
from pipelines.errors import UsageError

REACH = 0.1  # a trajectory reaches the optimum if it stays within this distance


@dataclass(frozen=True)
class Trajectory:
    """The path of an optimizer in `steps` steps: `points` is `(steps + 1, 2)`, `values` is `(steps + 1,)`.

    A trajectory that diverges is shorter: it ends before the first point or value that is not finite, and
    `diverged_at` is the step that led there.
    """

    function: TestFunction
    settings: OptimizerSettings
    steps: int
    points: npt.NDArray[np.float64] = field(repr=False)
    values: npt.NDArray[np.float64] = field(repr=False)
    diverged_at: int | None = None

    @property
    def final_point(self) -> Point:
        """The last point."""
        return float(self.points[-1, 0]), float(self.points[-1, 1])

    @property
    def final_value(self) -> float:
        """The function at the last point."""
        return float(self.values[-1])

    @property
    def lowest_step(self) -> int:
        """The step that led to the lowest value."""
        return int(self.values.argmin())

    @property
    def lowest_point(self) -> Point:
        """The point with the lowest value."""
        x, y = self.points[self.lowest_step]
        return float(x), float(y)

    @property
    def distances(self) -> npt.NDArray[np.float64]:
        """Distance of every point to the nearest global minimum, `(steps + 1,)`; infinite if none is known."""
        if not self.function.optima:
            return np.full(len(self.points), math.inf)
        gaps = self.points[:, None, :] - np.array(self.function.optima)
        return np.asarray(np.hypot(gaps[..., 0], gaps[..., 1]).min(axis=1), dtype=np.float64)

    @property
    def distance(self) -> float:
        """Distance of the last point to the nearest global minimum."""
        return float(self.distances[-1])

    @property
    def late_distance(self) -> float:
        """The largest distance in the last tenth of the steps: far above `distance` if the trajectory oscillates."""
        return float(self.distances[-max(1, len(self.distances) // 10) :].max())

    @property
    def steps_to_reach(self) -> int | None:
        """The first step from which the distance stays below `REACH` to the end; `None` if it does not."""
        if self.diverged_at is not None:
            return None
        return first_for_good(self.distances < REACH)


def run_trajectories(
    function: TestFunction,
    settings: Sequence[OptimizerSettings],
    start: Point | None = None,
    steps: int | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[Trajectory]:
    """Run each setting on a function in double precision; default start and steps are the function's own.

    A trajectory that jumps between the walls of a valley amplifies rounding errors: on Rosenbrock, the end points of
    Adam at lr 0.2 and of AccAsro differ by up to about 0.04 between machines or versions of PyTorch.

    On a noisy function all settings get the same noise at a step: it depends only on `seed` and the step. `progress` is
    called with the number of steps since its last call. Raises `UsageError` if the function is not finite at the
    start.
    """
    start, steps = start or function.start, steps or function.steps
    if not function.evaluate(*torch.tensor(start, dtype=torch.float64)).isfinite():
        advice = f"start nearer to the optimum, {function.optimum}" if function.optimum else "choose another --start"
        raise UsageError(f"{function.name} is not finite at {start}: {advice}")
    points = torch.tensor([start] * len(settings), dtype=torch.float64)
    noise = torch.from_numpy(function.noise * gradient_noise(seed, steps))

    def values(stacks: Sequence[Tensor]) -> Tensor:
        return function.evaluate(*stacks[0].unbind(-1))

    path = [points.tolist() for _ in descend(values, [points], settings, steps, noise, progress)]
    places = torch.tensor(path, dtype=torch.float64).unbind(1)
    return [_finite_part(function, setting, steps, place) for setting, place in zip(settings, places, strict=True)]


def gradient_noise(seed: int, steps: int) -> npt.NDArray[np.float64]:
    """Return standard normal noise, `(steps, 2)`; a row depends on the seed and its step, not on `steps`."""
    return np.random.default_rng(seed).standard_normal((steps, 2))


def choose_functions(names: Sequence[str], expression: str | None) -> list[TestFunction]:
    """Return the named functions, then the user's own. Raise `UsageError` that shows the error's place in it."""
    try:
        own = [] if expression is None else [expression_function(expression)]
    except ValueError as error:
        raise UsageError(f"--expression: {error}") from None
    return [FUNCTIONS[name] for name in names] + own


def _finite_part(function: TestFunction, settings: OptimizerSettings, steps: int, points: Tensor) -> Trajectory:
    values = function.evaluate(points[:, 0], points[:, 1])
    not_finite = torch.nonzero(~(values.isfinite() & points.isfinite().all(dim=1))).flatten().tolist()
    end = not_finite[0] if not_finite else None
    return Trajectory(function, settings, steps, points[:end].numpy(), values[:end].numpy(), diverged_at=end)
