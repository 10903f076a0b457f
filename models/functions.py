"""Two-dimensional test functions for comparing the trajectories of optimizers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

Point = tuple[float, float]

Formula = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class TestFunction:
    """A function of two variables, with the defaults for a run on it.

    `evaluate` takes two tensors of one floating dtype with broadcastable shapes, and returns the values in that dtype.
    Autograd gives the derivative of `abs` at 0 as 0. `start` is the first point of a trajectory, `steps` its length.

    `optimum` is a global minimum, or None if unknown; `further_optima` are the other global minima. `view` is the
    rectangle to show (lower left and upper right corner); a function without lower bound has its optimum only within
    it. `noise` is the standard deviation of the noise added to both gradient components at every step; the values are
    exact.
    """

    __test__: ClassVar[bool] = False  # pytest would collect a class named Test...

    name: str
    title: str
    formula: str
    evaluate: Formula
    start: Point
    optimum: Point | None
    steps: int
    further_optima: tuple[Point, ...] = ()
    view: tuple[Point, Point] | None = None
    noise: float = 0.0

    @property
    def optima(self) -> tuple[Point, ...]:
        """All known global minima."""
        return () if self.optimum is None else (self.optimum, *self.further_optima)

    def with_noise(self, noise: float) -> TestFunction:
        """Return the function with noise in its gradient; its name gets the prefix `noisy_`."""
        return replace(self, name=f"noisy_{self.name}", title=f"{self.title}, noisy", noise=noise)


def _abs_sum(x: Tensor, y: Tensor) -> Tensor:
    return abs(x) + abs(y)


def _inseparable_l1(x: Tensor, y: Tensor) -> Tensor:
    return abs(x + y) + abs(x - y) / 10


def _inseparable_l2(x: Tensor, y: Tensor) -> Tensor:
    return (x + y) ** 2 + (x - y) ** 2 / 10


def _abs_sum_div(x: Tensor, y: Tensor) -> Tensor:
    return abs(x) / 10 + abs(y)


def _beale(x: Tensor, y: Tensor) -> Tensor:
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


def _rosenbrock(x: Tensor, y: Tensor) -> Tensor:
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def _himmelblau(x: Tensor, y: Tensor) -> Tensor:
    return (x**2 + y - 11) ** 2 + (x + y**2 - 7) ** 2


def _booth(x: Tensor, y: Tensor) -> Tensor:
    return (x + 2 * y - 7) ** 2 + (2 * x + y - 5) ** 2


def _matyas(x: Tensor, y: Tensor) -> Tensor:
    return 0.26 * (x**2 + y**2) - 0.48 * x * y


def _ackley(x: Tensor, y: Tensor) -> Tensor:
    # `vector_norm` has a finite gradient at 0; `sqrt(x² + y²)` would give NaN.
    shape = (x + y).shape
    distance = torch.linalg.vector_norm(torch.stack([x.expand(shape), y.expand(shape)]), dim=0) / math.sqrt(2)
    waves = ((2 * math.pi * x).cos() + (2 * math.pi * y).cos()) / 2
    values: Tensor = 20 + math.e - 20 * (-0.2 * distance).exp() - waves.exp()
    return values


def _rastrigin(x: Tensor, y: Tensor) -> Tensor:
    return 20 + x**2 + y**2 - 10 * ((2 * math.pi * x).cos() + (2 * math.pi * y).cos())


def _styblinski_tang(x: Tensor, y: Tensor) -> Tensor:
    return (x**4 - 16 * x**2 + 5 * x + y**4 - 16 * y**2 + 5 * y) / 2


def _three_hump_camel(x: Tensor, y: Tensor) -> Tensor:
    return 2 * x**2 - 1.05 * x**4 + x**6 / 6 + x * y + y**2


def _goldstein_price(x: Tensor, y: Tensor) -> Tensor:
    first = 19 - 14 * x + 3 * x**2 - 14 * y + 6 * x * y + 3 * y**2
    second = 18 - 32 * x + 12 * x**2 + 48 * y - 36 * x * y + 27 * y**2
    return (1 + (x + y + 1) ** 2 * first) * (30 + (2 * x - 3 * y) ** 2 * second)


def _mccormick(x: Tensor, y: Tensor) -> Tensor:
    return (x + y).sin() + (x - y) ** 2 - 1.5 * x + 2.5 * y + 1


def _levy13(x: Tensor, y: Tensor) -> Tensor:
    sine_x, sine_y, slow_sine_y = (3 * math.pi * x).sin(), (3 * math.pi * y).sin(), (2 * math.pi * y).sin()
    return sine_x**2 + (x - 1) ** 2 * (1 + sine_y**2) + (y - 1) ** 2 * (1 + slow_sine_y**2)


def _saddle(x: Tensor, y: Tensor) -> Tensor:
    return x**2 / 2 + y**4 / 4 - y**2 / 2


def _narrow_valley(x: Tensor, y: Tensor) -> Tensor:
    return (x + y) ** 2 + 1000 * (x - y) ** 2


# The six functions of the Asro paper, with its starts and steps.
PAPER_FUNCTIONS = (
    TestFunction("abs_sum", "Absolute sum", "|x| + |y|", _abs_sum, (3.0, 7.0), (0.0, 0.0), 150),
    TestFunction(
        "inseparable_l1", "Inseparable L1", "|x + y| + |x − y| / 10", _inseparable_l1, (-2.0, -4.0), (0.0, 0.0), 400
    ),
    TestFunction(
        "inseparable_l2", "Inseparable L2", "(x + y)² + (x − y)² / 10", _inseparable_l2, (5.0, 2.0), (0.0, 0.0), 400
    ),
    TestFunction("abs_sum_div", "Scaled absolute sum", "|x| / 10 + |y|", _abs_sum_div, (-4.0, -7.0), (0.0, 0.0), 400),
    TestFunction(
        "beale",
        "Beale",
        "(1.5 − x + xy)² + (2.25 − x + xy²)² + (2.625 − x + xy³)²",
        _beale,
        (-9.0, -9.0),
        (3.0, 0.5),
        20_000,
    ),
    TestFunction("rosenbrock", "Rosenbrock", "(1 − x)² + 100 (y − x²)²", _rosenbrock, (0.0, -6.0), (1.0, 1.0), 5_000),
)

# Common functions, from Jamil and Yang, arXiv 1308.4008, unless noted; starts and steps are ours.
USUAL_FUNCTIONS = (
    TestFunction(
        "himmelblau",
        "Himmelblau",
        "(x² + y − 11)² + (x + y² − 7)²",
        _himmelblau,
        (0.0, -4.5),
        (3.0, 2.0),
        1_000,
        (
            (-2.805118086952745, 3.131312518250573),
            (-3.779310253377747, -3.283185991286170),
            (3.584428340330492, -1.848126526964404),
        ),
    ),
    TestFunction("booth", "Booth", "(x + 2y − 7)² + (2x + y − 5)²", _booth, (-8.0, -6.0), (1.0, 3.0), 1_000),
    TestFunction("matyas", "Matyas", "0.26 (x² + y²) − 0.48 xy", _matyas, (-8.0, 5.0), (0.0, 0.0), 2_000),
    TestFunction(
        "ackley",
        "Ackley",
        "20 + e − 20 exp(−0.2 √((x² + y²) / 2)) − exp((cos 2πx + cos 2πy) / 2)",
        _ackley,
        (-1.4, 1.4),
        (0.0, 0.0),
        1_000,
    ),
    TestFunction(
        "rastrigin", "Rastrigin", "20 + x² + y² − 10 (cos 2πx + cos 2πy)", _rastrigin, (-1.4, 2.4), (0.0, 0.0), 1_000
    ),
    TestFunction(
        "styblinski_tang",
        "Styblinski–Tang",
        "(x⁴ − 16x² + 5x + y⁴ − 16y² + 5y) / 2",
        _styblinski_tang,
        (-0.2, -4.8),
        (-2.9035340277711770, -2.9035340277711770),
        1_000,
    ),
    TestFunction(
        "three_hump_camel",
        "Three-hump camel",
        "2x² − 1.05x⁴ + x⁶/6 + xy + y²",
        _three_hump_camel,
        (1.2, 3.0),
        (0.0, 0.0),
        1_000,
    ),
    TestFunction(
        "goldstein_price",
        "Goldstein–Price",
        "[1 + (x + y + 1)² (19 − 14x + 3x² − 14y + 6xy + 3y²)] [30 + (2x − 3y)² (18 − 32x + 12x² + 48y − 36xy + 27y²)]",
        _goldstein_price,
        (-1.5, 0.5),
        (0.0, -1.0),
        1_000,
    ),
    TestFunction(
        "mccormick",
        "McCormick",
        "sin(x + y) + (x − y)² − 1.5x + 2.5y + 1",
        _mccormick,
        (3.5, -2.5),
        (0.5 - math.pi / 3, -0.5 - math.pi / 3),
        1_000,
        view=((-1.5, -3.0), (4.0, 4.0)),
    ),
    TestFunction(
        "levy13",
        "Lévy 13",
        "sin²(3πx) + (x − 1)² (1 + sin²(3πy)) + (y − 1)² (1 + sin²(2πy))",
        _levy13,
        (2.6, 2.4),
        (1.0, 1.0),
        1_000,
    ),
    # Nesterov, Introductory Lectures on Convex Optimization, 1.2.3: near y = 0 the gradient leads to the saddle at 0.
    TestFunction(
        "saddle",
        "Saddle",
        "x²/2 + y⁴/4 − y²/2",
        _saddle,
        (-2.0, 1e-3),
        (0.0, 1.0),
        1_000,
        ((0.0, -1.0),),
    ),
    # Ours: a quadratic with condition number 1000, whose principal axes are the diagonals.
    TestFunction(
        "narrow_valley",
        "Narrow valley",
        "(x + y)² + 1000 (x − y)²",
        _narrow_valley,
        (4.0, 3.0),
        (0.0, 0.0),
        2_000,
    ),
)

# Ours: noise of about the size of the gradient along the trajectory.
_NOISE = {"abs_sum": 1.0, "inseparable_l2": 1.0, "rosenbrock": 10.0}
NOISY_FUNCTIONS = tuple(
    function.with_noise(_NOISE[function.name]) for function in PAPER_FUNCTIONS if function.name in _NOISE
)

FUNCTIONS: dict[str, TestFunction] = {
    function.name: function for function in PAPER_FUNCTIONS + USUAL_FUNCTIONS + NOISY_FUNCTIONS
}
