"""Find the learning rates at which an optimizer converges on a test problem."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from models.functions import Point, TestFunction
from models.matrix_problems import MatrixProblem
from pipelines.analysis.descent import first_for_good
from pipelines.analysis.matrix_losses import SHARE, run_losses
from pipelines.analysis.optimizer_settings import OptimizerSettings
from pipelines.analysis.trajectories import REACH, Trajectory, run_trajectories
from pipelines.errors import UsageError

SHOWN = ("sgd-momentum", "adam", "asro", "accasro")
"""The default optimizers on 2-D functions."""

_MOST_STEPS = 2000  # by default: Beale's own 20,000 would take minutes
_MOST_RATES = 100


@dataclass(frozen=True)
class Outcome:
    """Result of a run at one learning rate; `steps_to_converge` is `None` if it did not converge."""

    lr: float
    steps_to_converge: int | None
    diverged_at: int | None
    lowest_value: float


@dataclass(frozen=True)
class RateScan:
    """An optimizer's outcomes, in ascending order of the rate."""

    label: str
    optimizer: str
    outcomes: tuple[Outcome, ...]

    @property
    def converging(self) -> list[Outcome]:
        """The outcomes that converged."""
        return [outcome for outcome in self.outcomes if outcome.steps_to_converge is not None]

    @property
    def best(self) -> Outcome | None:
        """The outcome with the fewest steps to convergence; on a tie, that of the lowest rate."""
        return min(self.converging, key=lambda outcome: outcome.steps_to_converge or 0, default=None)


@dataclass(frozen=True)
class RateGrid:
    """The scans of several optimizers on one problem; `goal` says what counts as converged."""

    name: str
    title: str
    formula: str
    steps: int
    goal: str
    scans: tuple[RateScan, ...]


def parse_rates(text: str) -> list[float]:
    """Parse `LOW:HIGH:COUNT`; return rates evenly spaced on a log scale. Raise `UsageError` for other texts."""
    try:
        low_text, high_text, count_text = text.split(":")
        low, high, count = float(low_text), float(high_text), int(count_text)
    except ValueError:
        low = high = math.nan
        count = 0
    if not (0 < low < high < math.inf and 2 <= count <= _MOST_RATES):
        raise UsageError(
            f"--lr-grid {text}: must be LOW:HIGH:COUNT, as in --lr-grid 1e-4:1:13, "
            f"with 0 < LOW < HIGH and 2 to {_MOST_RATES} rates"
        )
    # Round, so that 0.0010000000000000002 is shown as 0.001.
    return [float(f"{rate:.6g}") for rate in np.geomspace(low, high, count)]


def scan_function(
    function: TestFunction,
    settings: Sequence[OptimizerSettings],
    rates: Sequence[float],
    start: Point | None = None,
    steps: int | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> RateGrid:
    """Run every setting at every rate on a 2-D function, by `run_trajectories`; default: at most 2,000 steps.

    A run has converged if it stays within 0.1 of an optimum. If no optimum is known, its value must stay within a
    thousandth of the start's height above the lowest value that any run of the grid found without diverging.
    """
    steps = steps or scan_steps(function.steps)
    runs = run_trajectories(function, _at_rates(settings, rates), start, steps, seed, progress)
    if function.optima:
        goal = f"stays within {REACH} of an optimum"
        reached = [run.steps_to_reach for run in runs]
    else:
        goal = f"stays within {SHARE:g} of the start's height above the lowest value found"
        reached = _near_lowest(runs)
    outcomes = [
        Outcome(run.settings.keywords["lr"], first, run.diverged_at, float(run.values.min()))
        for run, first in zip(runs, reached, strict=True)
    ]
    return RateGrid(function.name, function.title, function.formula, steps, goal, _scans(settings, outcomes))


def scan_problem(
    problem: MatrixProblem,
    settings: Sequence[OptimizerSettings],
    rates: Sequence[float],
    steps: int | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> RateGrid:
    """Run every setting at every rate on a matrix problem, by `run_losses`.

    A run has converged if its loss stays below a thousandth of the first.
    """
    steps = steps or problem.steps
    runs = run_losses(problem, _at_rates(settings, rates), steps, seed, progress)
    outcomes = [
        Outcome(run.settings.keywords["lr"], run.steps_to_reach, run.diverged_at, float(run.values.min()))
        for run in runs
    ]
    goal = f"the loss stays below {SHARE:g} of the first"
    return RateGrid(problem.name, problem.title, problem.formula, steps, goal, _scans(settings, outcomes))


def scan_steps(steps: int) -> int:
    """Return the default number of steps for a function whose own number is `steps`."""
    return min(steps, _MOST_STEPS)


def _at_rates(settings: Sequence[OptimizerSettings], rates: Sequence[float]) -> list[OptimizerSettings]:
    return [replace(setting, keywords={**setting.keywords, "lr": rate}) for setting in settings for rate in rates]


def _near_lowest(runs: Sequence[Trajectory]) -> list[int | None]:
    ended = [run for run in runs if run.diverged_at is None]
    if not ended:
        return [None] * len(runs)
    lowest = min(float(run.values.min()) for run in ended)
    limit = lowest + SHARE * (float(runs[0].values[0]) - lowest)
    return [first_for_good(run.values <= limit) if run.diverged_at is None else None for run in runs]


def _scans(settings: Sequence[OptimizerSettings], outcomes: Sequence[Outcome]) -> tuple[RateScan, ...]:
    rows = np.array_split(np.arange(len(outcomes)), len(settings))
    return tuple(
        RateScan(setting.label, setting.optimizer, tuple(outcomes[index] for index in row))
        for setting, row in zip(settings, rows, strict=True)
    )
