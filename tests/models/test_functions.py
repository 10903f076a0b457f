"""The test functions: their formulas, minima and the papers' runs."""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch

from models.functions import FUNCTIONS, NOISY_FUNCTIONS, PAPER_FUNCTIONS, TestFunction

ALL = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


def value(function: TestFunction, x: float, y: float) -> float:
    return float(function.evaluate(torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)))


def test_the_papers_starts_optima_and_steps() -> None:
    table = {f.name: (f.start, f.optimum, f.steps) for f in PAPER_FUNCTIONS}
    assert table == {
        "abs_sum": ((3, 7), (0, 0), 150),
        "inseparable_l1": ((-2, -4), (0, 0), 400),
        "inseparable_l2": ((5, 2), (0, 0), 400),
        "abs_sum_div": ((-4, -7), (0, 0), 400),
        "beale": ((-9, -9), (3, 0.5), 20_000),
        "rosenbrock": ((0, -6), (1, 1), 5_000),
    }


# By hand from the formulas; of the usual functions, also the local minima that the literature gives.
@pytest.mark.parametrize(
    ("name", "x", "y", "expected"),
    [
        ("abs_sum", 3, -7, 10),
        ("inseparable_l1", -2, -4, 6.2),
        ("inseparable_l2", 5, 2, 49.9),
        ("abs_sum_div", -4, -7, 7.4),
        ("beale", 0, 0, 1.5**2 + 2.25**2 + 2.625**2),
        ("beale", 1, 2, 2.5**2 + 5.25**2 + 9.625**2),
        ("rosenbrock", 0, -6, 3601),
        ("rosenbrock", 2, 3, 101),
        ("himmelblau", 0, 0, 170),
        ("booth", 0, 0, 74),
        ("matyas", 10, 10, 4),
        ("ackley", 1, 1, 20 - 20 * math.exp(-0.2)),
        ("rastrigin", 1, -1, 2),
        ("styblinski_tang", 1, -1, -15),
        ("three_hump_camel", 1, 1, 2 - 1.05 + 1 / 6 + 2),
        ("goldstein_price", 0, 0, 600),
        ("goldstein_price", -0.6, -0.4, 30),
        ("goldstein_price", 1.8, 0.2, 84),
        ("goldstein_price", 0, -1, 3),
        ("mccormick", 0.5 - math.pi / 3, -0.5 - math.pi / 3, -math.sqrt(3) / 2 - math.pi / 3),
        ("levy13", 1, 1, 0),
        ("levy13", 0.5, 0.75, 1 + 0.25 * 1.5 + 0.0625 * 2),
        ("saddle", 0, 0, 0),
        ("saddle", 2, -1, 1.75),
        ("narrow_valley", 3, 1, 16 + 4000),
    ],
)
def test_values(name: str, x: float, y: float, expected: float) -> None:
    assert value(FUNCTIONS[name], x, y) == pytest.approx(expected, rel=1e-12, abs=1e-12)


# The same functions in another algebraic form, in plain floats.
OTHER_FORMS: dict[str, Callable[[float, float], float]] = {
    "himmelblau": lambda x, y: (
        x**4 + y**4 + 2 * x * x * y + 2 * x * y * y - 21 * x * x - 13 * y * y - 14 * x - 22 * y + 170
    ),
    "booth": lambda x, y: 5 * x * x + 5 * y * y + 8 * x * y - 34 * x - 38 * y + 74,
    "matyas": lambda x, y: 0.02 * (x * x + y * y) + 0.24 * (x - y) ** 2,
    "ackley": lambda x, y: (
        20 * (1 - math.exp(-0.2 * math.hypot(x, y) / math.sqrt(2)))
        + math.e
        - math.exp(math.cos(math.pi * (x + y)) * math.cos(math.pi * (x - y)))
    ),
    "rastrigin": lambda x, y: sum(z * z + 20 * math.sin(math.pi * z) ** 2 for z in (x, y)),
    "styblinski_tang": lambda x, y: sum((z * (z * (z * z - 16) + 5)) / 2 for z in (x, y)),
    "mccormick": lambda x, y: (
        math.sin(x) * math.cos(y) + math.cos(x) * math.sin(y) + x * x - 2 * x * y + y * y + (5 * y - 3 * x) / 2 + 1
    ),
    "levy13": lambda x, y: (
        (1 - math.cos(6 * math.pi * x)) / 2
        + (x - 1) ** 2 * (3 - math.cos(6 * math.pi * y)) / 2
        + (y - 1) ** 2 * (3 - math.cos(4 * math.pi * y)) / 2
    ),
    "saddle": lambda x, y: x * x / 2 + (y * y - 1) ** 2 / 4 - 0.25,
    "narrow_valley": lambda x, y: 1001 * x * x + 1001 * y * y - 1998 * x * y,
}


@pytest.mark.parametrize("name", OTHER_FORMS)
def test_a_function_agrees_with_another_form_of_it(name: str) -> None:
    for x, y in np.random.default_rng(0).uniform(-4, 4, (50, 2)).tolist():
        assert value(FUNCTIONS[name], x, y) == pytest.approx(OTHER_FORMS[name](x, y), rel=1e-11, abs=1e-11)


def in_view(function: TestFunction, x: float, y: float) -> bool:
    if function.view is None:
        return True
    (left, below), (right, above) = function.view
    return left <= x <= right and below <= y <= above


@ALL
def test_an_optimum_is_lower_than_all_around_it(function: TestFunction) -> None:
    assert function.optimum is not None
    lowest = value(function, *function.optimum)
    for x, y in function.optima:
        assert value(function, x, y) == pytest.approx(lowest, abs=1e-12)
        for radius in (1e-3, 0.1, 1.0, 4.0):
            for angle in np.linspace(0, 2 * math.pi, 37):
                near = x + radius * math.cos(angle), y + radius * math.sin(angle)
                assert value(function, *near) > lowest - 1e-12 or not in_view(function, *near)
        assert np.abs(gradient(function, x, y)).max() < 1e-9, (
            "also where the root in Ackley's function has no derivative"
        )


@ALL
def test_the_whole_view_is_higher_than_the_optimum(function: TestFunction) -> None:
    (left, below), (right, above) = function.view or ((-10.0, -10.0), (10.0, 10.0))
    x, y = (torch.linspace(*ends, 401, dtype=torch.float64) for ends in ((left, right), (below, above)))
    assert function.optimum is not None
    assert float(function.evaluate(x[None, :], y[:, None]).min()) > value(function, *function.optimum) - 1e-12


def gradient(function: TestFunction, x: float, y: float) -> npt.NDArray[np.float64]:
    point = torch.tensor([x, y], dtype=torch.float64, requires_grad=True)
    (result,) = torch.autograd.grad(function.evaluate(*point.unbind()), point)
    return np.asarray(result.numpy())


@ALL
def test_a_gradient_agrees_with_finite_differences(function: TestFunction) -> None:
    width = 1e-5
    for x, y in np.random.default_rng(1).uniform(-3, 3, (20, 2)).tolist():
        along_x = (value(function, x + width, y) - value(function, x - width, y)) / (2 * width)
        along_y = (value(function, x, y + width) - value(function, x, y - width)) / (2 * width)
        assert gradient(function, x, y) == pytest.approx(np.array([along_x, along_y]), rel=1e-5, abs=1e-5)


def test_noisy_functions_differ_by_their_noise_only() -> None:
    for function in NOISY_FUNCTIONS:
        exact = FUNCTIONS[function.name.removeprefix("noisy_")]
        assert function.noise > 0 == exact.noise
        assert (function.evaluate, function.start, function.optima) == (exact.evaluate, exact.start, exact.optima)


@ALL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_function_fills_a_grid_and_keeps_the_dtype(function: TestFunction, dtype: torch.dtype) -> None:
    x, y = torch.linspace(-2, 2, 4, dtype=dtype), torch.linspace(-1, 1, 3, dtype=dtype)
    grid = function.evaluate(x[None, :], y[:, None])
    assert grid.shape == (3, 4)
    assert grid.dtype == dtype
    assert grid[2, 1] == function.evaluate(x[1], y[2])
