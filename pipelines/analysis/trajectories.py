"""Trajectories of optimizers on two-dimensional test functions."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.expression import expression_function
from models.functions import FUNCTIONS, Point
from models.functions import TestFunction as TestFunction  # for those who may not import models
from optim.keywords import unknown_name
from optim.matrix_optimizer import MatrixOptimizer
from optim.registry import optimizer_class
from pipelines.errors import UsageError
from pipelines.resolve import read_preset

_PRESET = "asro-functions"
_STEPS_A_REPORT = 50
REACH = 0.1  # a trajectory has reached the optimum when it stays within this distance of it

_TITLES = {
    "asro": "Asro",
    "accasro": "AccAsro",
    "adam": "Adam",
    "adamw": "AdamW",
    "amsgrad": "AMSGrad",
    "radam": "RAdam",
    "rmsprop": "RMSprop",
    "adagrad": "Adagrad",
    "sgd-momentum": "SGD momentum",
    "sgd-nesterov": "SGD Nesterov",
}
# How a trajectory is computed is not the user's choice, and its length is said once, for all optimizers.
_NOT_OFFERED = {"params", "total_steps", "foreach", "fused", "capturable", "differentiable", "maximize"}


@dataclass(frozen=True)
class TrajectorySettings:
    """An optimizer with the keywords of its constructor, and its name in legends and tables."""

    optimizer: str
    keywords: Mapping[str, Any]
    label: str


@dataclass(frozen=True)
class Trajectory:
    """Where an optimizer went in `steps` steps: `points` is `(steps + 1, 2)`, `values` is `(steps + 1,)`.

    A trajectory that diverges is shorter: it ends before the first point or value that is not finite, and
    `diverged_at` is the step that led there.
    """

    function: TestFunction
    settings: TrajectorySettings
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
        """Where the value was lowest."""
        x, y = self.points[self.lowest_step]
        return float(x), float(y)

    @property
    def distances(self) -> npt.NDArray[np.float64]:
        """Distance of every point to the nearest global minimum, `(steps + 1,)`; infinite where none is known."""
        if not self.function.optima:
            return np.full(len(self.points), math.inf)
        gaps = self.points[:, None, :] - np.array(self.function.optima)
        return np.asarray(np.hypot(gaps[..., 0], gaps[..., 1]).min(axis=1), dtype=np.float64)

    @property
    def distance(self) -> float:
        """Distance of the last point to the nearest global minimum."""
        return float(self.distances[-1])

    @property
    def steps_to_reach(self) -> int | None:
        """The first step from which the distance stays below `REACH` to the end; `None` if it does not."""
        if self.diverged_at is not None:
            return None
        outside = np.flatnonzero(self.distances >= REACH)
        first = int(outside[-1]) + 1 if outside.size else 0
        return first if first < len(self.points) else None


def default_settings() -> list[TrajectorySettings]:
    """The settings of the Asro paper's figure, from the preset `asro-functions`."""
    entries: list[dict[str, Any]] = read_preset(_PRESET)["trajectories"]
    return [_settings(entry.pop("optimizer"), entry, shown=["lr"]) for entry in entries]


def parse_settings(text: str) -> TrajectorySettings:
    """Read `NAME` or `NAME:key=value,key=value`, for example `accasro:lr=0.02,betas=0.9,0.99`.

    Keywords that are left out take the preset's value for that optimizer, or else the constructor's default.
    Raises `UsageError` for a name, a keyword or a value that cannot be, before anything is computed.
    """
    name, _, listed = text.partition(":")
    try:
        if issubclass(optimizer_class(name)[0], MatrixOptimizer):
            raise ValueError(f"{name} updates matrices and cannot move a point; choose from {', '.join(_TITLES)}")
        given = _parse_keywords(name, listed)
        settings = _settings(name, {**read_preset(_PRESET)["optimizers"][name], **given}, shown=["lr", *given])
        _build(settings, torch.zeros(2), total_steps=1)
    except (TypeError, ValueError) as error:
        raise UsageError(f"--optimizer {text}: {error}") from None
    return settings


def run_trajectories(
    function: TestFunction,
    settings: Sequence[TrajectorySettings],
    start: Point | None = None,
    steps: int | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[Trajectory]:
    """Run each setting on a function in double precision; start and steps are the function's own where left out.

    A trajectory that jumps from wall to wall of a valley amplifies errors of rounding: on Rosenbrock, Adam at lr 0.2
    and AccAsro end within about 0.04 of the same place on another machine or with another version of PyTorch.

    Where the function is noisy, all settings find the same noise at a step: it follows from `seed` and the step alone.
    `progress` is called with the number of steps just taken. Raises `UsageError` if the function is not finite at the
    start.
    """
    start, steps = start or function.start, steps or function.steps
    if not function.evaluate(*torch.tensor(start, dtype=torch.float64)).isfinite():
        advice = f"start nearer to the optimum, {function.optimum}" if function.optimum else "choose another --start"
        raise UsageError(f"{function.name} is not finite at {start}: {advice}")
    # All settings side by side, because autograd takes as long for one point as for a few.
    points = torch.tensor([start] * len(settings), dtype=torch.float64, requires_grad=True)
    rows = points.detach().unbind()
    optimizers = [_build(setting, row, steps) for setting, row in zip(settings, rows, strict=True)]
    noise = torch.from_numpy(function.noise * gradient_noise(seed, steps))
    path = [points.tolist()]
    for step in range(steps):
        (gradient,) = torch.autograd.grad(function.evaluate(*points.unbind(-1)).sum(), points)
        for row, row_gradient, optimizer in zip(rows, gradient + noise[step], optimizers, strict=True):
            row.grad = row_gradient
            optimizer.step()
        path.append(points.tolist())
        if progress is not None and (step + 1) % _STEPS_A_REPORT == 0:
            progress(_STEPS_A_REPORT)
    places = torch.tensor(path, dtype=torch.float64).unbind(1)
    return [_finite_part(function, setting, steps, place) for setting, place in zip(settings, places, strict=True)]


def gradient_noise(seed: int, steps: int) -> npt.NDArray[np.float64]:
    """Standard normal noise, `(steps, 2)`; a row depends on the seed and on its step, not on the number of steps."""
    return np.random.default_rng(seed).standard_normal((steps, 2))


def choose_functions(names: Sequence[str], expression: str | None) -> list[TestFunction]:
    """The functions of these names, and then the user's own; raises `UsageError` with the place that is wrong in it."""
    try:
        own = [] if expression is None else [expression_function(expression)]
    except ValueError as error:
        raise UsageError(f"--expression: {error}") from None
    return [FUNCTIONS[name] for name in names] + own


def run_panels(
    functions: Sequence[TestFunction],
    settings: Sequence[TrajectorySettings],
    start: Point | None,
    steps: int | None,
    seed: int,
    progress: Callable[[str, int, int], None],
) -> list[list[Trajectory]]:
    """`run_trajectories` on each function; `progress` gets a function's name, steps taken and steps in all."""
    total, done = sum(steps or function.steps for function in functions), 0
    panels = []
    for function in functions:

        def report(more: int, name: str = function.name) -> None:
            nonlocal done
            done += more
            progress(name, done, total)

        panels.append(run_trajectories(function, settings, start, steps, seed, report))
    return panels


def _finite_part(function: TestFunction, settings: TrajectorySettings, steps: int, points: Tensor) -> Trajectory:
    values = function.evaluate(points[:, 0], points[:, 1])
    not_finite = torch.nonzero(~(values.isfinite() & points.isfinite().all(dim=1))).flatten().tolist()
    end = not_finite[0] if not_finite else None
    return Trajectory(function, settings, steps, points[:end].numpy(), values[:end].numpy(), diverged_at=end)


def _build(settings: TrajectorySettings, point: Tensor, total_steps: int) -> torch.optim.Optimizer:
    cls, fixed = optimizer_class(settings.optimizer)
    keywords = {**fixed, **settings.keywords}
    if "total_steps" in inspect.signature(cls).parameters:
        keywords["total_steps"] = total_steps
    return cls([point], **keywords)


def _settings(name: str, keywords: Mapping[str, Any], shown: Collection[str]) -> TrajectorySettings:
    values = [f"{key} {_plain(value)}" for key, value in keywords.items() if key in shown]
    return TrajectorySettings(name, dict(keywords), ", ".join([_TITLES[name], *values]))


def _plain(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _parse_keywords(name: str, listed: str) -> dict[str, Any]:
    cls, _ = optimizer_class(name)
    offered = {key: entry for key, entry in inspect.signature(cls).parameters.items() if key not in _NOT_OFFERED}
    keywords: dict[str, Any] = {}
    # A comma separates keywords, and also the numbers of one keyword: it is the former where a key follows.
    for item in re.split(r",(?=[^,=]*=)", listed) if listed else []:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise ValueError(f"{item!r} is not key=value")
        if key not in offered:
            raise unknown_name(f"keyword of {name}", key, offered)
        keywords[key] = _parse_value(key, value, offered[key].default)
    return keywords


def _parse_value(key: str, text: str, default: Any) -> Any:
    """Read a value of the default's kind: true or false, several numbers, or one number."""
    if isinstance(default, bool):
        if text not in ("true", "false"):
            raise ValueError(f"{key} takes true or false, not {text!r}")
        return text == "true"
    if isinstance(default, tuple):
        numbers = tuple(_number(key, part) for part in text.split(","))
        if len(numbers) != len(default):
            raise ValueError(f"{key} takes {len(default)} numbers, not {text!r}")
        return numbers
    return _number(key, text)


def _number(key: str, text: str) -> int | float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{key} takes a number, not {text!r}") from None
    if not math.isfinite(value):
        raise ValueError(f"{key} takes a finite number, not {text!r}")
    return int(text) if re.fullmatch(r"[+-]?\d+", text) else value
