"""The test functions: their formulas, minima and the papers' runs."""

import math

import numpy as np
import pytest
import torch

from models.functions import FUNCTIONS, PAPER_FUNCTIONS, TestFunction

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
    ],
)
def test_values(name: str, x: float, y: float, expected: float) -> None:
    assert value(FUNCTIONS[name], x, y) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@ALL
def test_an_optimum_is_lower_than_all_around_it(function: TestFunction) -> None:
    lowest = value(function, *function.optimum)
    for x, y in function.optima:
        assert value(function, x, y) == pytest.approx(lowest, abs=1e-12)
        for radius in (1e-3, 0.1, 1.0, 4.0):
            for angle in np.linspace(0, 2 * math.pi, 37):
                assert value(function, x + radius * math.cos(angle), y + radius * math.sin(angle)) > lowest - 1e-12
        point = torch.tensor([x, y], dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(function.evaluate(*point.unbind()), point)
        assert gradient.abs().max() < 1e-9, "also where the root in Ackley's function has no derivative"


@ALL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_function_fills_a_grid_and_keeps_the_dtype(function: TestFunction, dtype: torch.dtype) -> None:
    x, y = torch.linspace(-2, 2, 4, dtype=dtype), torch.linspace(-1, 1, 3, dtype=dtype)
    grid = function.evaluate(x[None, :], y[:, None])
    assert grid.shape == (3, 4)
    assert grid.dtype == dtype
    assert grid[2, 1] == function.evaluate(x[1], y[2])
