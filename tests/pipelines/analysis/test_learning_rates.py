"""Which learning rates converge: against single runs, and against closed formulas."""

import re
from pathlib import Path

import numpy as np
import pytest

from models.expression import expression_function
from models.functions import FUNCTIONS
from models.matrix_problems import PROBLEMS
from pipelines.analysis.learning_rate_figure import draw_rates
from pipelines.analysis.learning_rates import Outcome, RateScan, parse_rates, scan_function, scan_problem, scan_steps
from pipelines.analysis.matrix_losses import run_losses
from pipelines.analysis.optimizer_settings import MATRICES, parse_settings
from pipelines.analysis.trajectories import run_trajectories
from pipelines.errors import UsageError


def test_rates_lie_evenly_on_a_log_scale() -> None:
    assert parse_rates("1e-4:1:5") == [1e-4, 1e-3, 1e-2, 0.1, 1]
    assert parse_rates("0.5:2:2") == [0.5, 2]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1:2",
        "1:2:3:4",
        "0:1:5",
        "-1:1:5",
        "2:1:5",
        "1:1:5",
        "1:2:1",
        "1:2:101",
        "1:inf:3",
        "nan:1:3",
        "a:1:3",
        "1:2:2.5",
    ],
)
def test_other_grids_are_refused_in_one_line(text: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"--lr-grid {text}: must be LOW:HIGH:COUNT, as in")):
        parse_rates(text)


def test_a_grid_gives_what_each_run_gives_alone() -> None:
    """All rates of an optimizer are groups of one: none may touch another."""
    function, rates = FUNCTIONS["inseparable_l2"], [0.01, 0.3, 300.0]
    texts = ["adam:betas=0.8,0.99", "sgd-momentum:", "accasro:", "asro:"]
    grid = scan_function(function, [parse_settings(text, all_rates=True) for text in texts], rates, steps=150)
    for scan, text in zip(grid.scans, texts, strict=True):
        for outcome, rate in zip(scan.outcomes, rates, strict=True):
            own_rate = f"{text},lr={rate}" if text.startswith("adam") else f"{text}lr={rate}"
            (alone,) = run_trajectories(function, [parse_settings(own_rate)], steps=150)
            expected = (rate, alone.steps_to_reach, alone.diverged_at, float(alone.values.min()))
            assert (outcome.lr, outcome.steps_to_converge, outcome.diverged_at, outcome.lowest_value) == expected
    assert grid.scans[1].outcomes[2].diverged_at is not None
    assert grid.scans[0].converging
    assert grid.scans[0].label == "Adam, betas 0.8/0.99"


def test_a_matrix_grid_gives_what_each_run_gives_alone() -> None:
    problem, rates = PROBLEMS["matrix_factorization"], [0.02, 0.2]
    settings = [parse_settings(name, MATRICES, all_rates=True) for name in ("adamw", "dasgo")]
    grid = scan_problem(problem, settings, rates, steps=150, seed=2)
    for scan in grid.scans:
        for outcome in scan.outcomes:
            setting = parse_settings(f"{scan.optimizer}:lr={outcome.lr}", MATRICES)
            (alone,) = run_losses(problem, [setting], steps=150, seed=2)
            assert outcome.lowest_value == pytest.approx(alone.values.min(), rel=1e-6)
            assert outcome.steps_to_converge == alone.steps_to_reach


def test_momentum_converges_up_to_the_rate_that_theory_gives() -> None:
    """On a quadratic of curvature h, with momentum 0.9: below 2 · 1.9 / h."""
    parabola = expression_function("x**2 + y**2")
    rates = [0.02, 0.5, 1.88, 1.92, 4.0]
    settings = [parse_settings("sgd-momentum", all_rates=True)]
    (scan,) = scan_function(parabola, settings, rates, (3.0, 1.0), steps=2000).scans
    assert [outcome.lr for outcome in scan.converging] == [0.02, 0.5, 1.88]
    assert scan.outcomes[-1].diverged_at is not None
    assert scan.best is not None
    assert scan.best.lr in (0.02, 0.5)


def test_where_no_optimum_is_known_the_value_decides() -> None:
    function = expression_function("(x - 1)**2 + y**2 - 5")
    settings = [parse_settings("adam", all_rates=True)]
    (scan,) = scan_function(function, settings, [0.001, 0.1], (4.0, 0.0), steps=400).scans
    slow, quick = run_trajectories(
        function, [parse_settings("adam:lr=0.001"), parse_settings("adam:lr=0.1")], (4.0, 0.0), 400
    )
    lowest = quick.values.min()
    above = np.flatnonzero(quick.values - lowest > 0.001 * (4 - lowest))
    assert scan.outcomes[1].steps_to_converge == above[-1] + 1
    assert scan.outcomes[0].steps_to_converge is None
    assert scan.outcomes[0].lowest_value == slow.values.min()


def test_the_best_rate_is_that_of_the_fewest_steps() -> None:
    outcomes = [Outcome(0.1, None, None, 1.0), Outcome(0.2, 7, None, 0.0), Outcome(0.4, 0, None, 0.0)]
    scan = RateScan("a", "adam", (*outcomes, Outcome(0.8, 0, None, 0.0), Outcome(1.6, None, 3, 1.0)))
    assert scan.best == outcomes[2]
    assert len(scan.converging) == 3
    assert RateScan("a", "adam", tuple(outcomes[:1])).best is None


def test_long_functions_are_cut_where_the_user_says_nothing() -> None:
    assert scan_steps(20_000) == 2000
    assert scan_steps(150) == 150


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_figure_has_a_panel_a_problem_and_tells_never_from_diverged(tmp_path: Path, suffix: str) -> None:
    settings = [parse_settings(name, all_rates=True) for name in ("adam", "sgd-momentum")]
    functions = [FUNCTIONS[name] for name in ("booth", "rosenbrock", "abs_sum")]
    grids = [scan_function(function, settings, [1e-4, 0.5, 100], steps=100) for function in functions]
    path = tmp_path / f"a{suffix}"
    draw_rates(grids, path)
    if suffix == ".png":
        assert path.read_bytes().startswith(b"\x89PNG")
        return
    svg = path.read_text(encoding="utf-8")
    for text in ("Booth, 100 steps", "Rosenbrock, 100 steps", "SGD momentum", "does not", "diverges", "fewest steps"):
        assert f">{text}<" in svg
