"""`asgo viz --lr-grid`: the learning rates at which optimizers converge, as a figure and a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asgo_cli import console
from asgo_cli.viz_request import Request, progress_bar
from pipelines.shell import command

if TYPE_CHECKING:
    from pipelines.analysis.learning_rates import RateGrid, RateScan


def show_rates(request: Request, rates_text: str, *, of_matrices: bool) -> None:
    """Run every optimizer at every rate, draw the results and print the table."""
    from pipelines.analysis.learning_rate_figure import check_rates_path, draw_rates
    from pipelines.analysis.learning_rates import parse_rates

    rates = parse_rates(rates_text)
    if request.out is not None:
        check_rates_path(request.out)
    grids = (_scan_problems if of_matrices else _scan_functions)(request, rates)
    names = [grid.name for grid in grids]
    path = request.path(names, "functions", "-rates")

    draw_rates(grids, path)
    if request.as_json:
        console.show_json({"figure": str(path), "rates": rates, "problems": [_as_json(grid) for grid in grids]})
    else:
        for grid in grids:
            _show(grid, len(rates))
    console.say(f"{path}: learning rates on {', '.join(names)}")
    best = [(scan.optimizer, scan.best.lr) for scan in grids[0].scans if scan.best is not None]
    chosen = [word for name, lr in best for word in ("--optimizer", f"{name}:lr={lr:g}")]
    console.suggest_next(f"{request.command} {command(*chosen)}".strip())


def _scan_functions(request: Request, rates: list[float]) -> list[RateGrid]:
    from pipelines.analysis.learning_rates import SHOWN, scan_function, scan_steps
    from pipelines.analysis.optimizer_settings import parse_settings
    from pipelines.analysis.trajectories import choose_functions

    functions = choose_functions(request.names, request.expression)
    settings = [parse_settings(text, all_rates=True) for text in request.optimizers or SHOWN]
    with progress_bar(sum(request.steps or scan_steps(function.steps) for function in functions)) as counter:
        return [
            scan_function(function, settings, rates, request.start, request.steps, request.seed, counter(function.name))
            for function in functions
        ]


def _scan_problems(request: Request, rates: list[float]) -> list[RateGrid]:
    from pipelines.analysis.learning_rates import scan_problem
    from pipelines.analysis.matrix_losses import choose_problems
    from pipelines.analysis.optimizer_settings import MATRICES, default_settings, parse_settings

    problems = choose_problems(request.names)
    texts = request.optimizers or [setting.optimizer for setting in default_settings(MATRICES)]
    settings = [parse_settings(text, MATRICES, all_rates=True) for text in texts]
    with progress_bar(sum(request.steps or problem.steps for problem in problems)) as counter:
        return [
            scan_problem(problem, settings, rates, request.steps, request.seed, counter(problem.name))
            for problem in problems
        ]


def _show(grid: RateGrid, rate_count: int) -> None:
    console.show_table(
        ["", "converging rates", f"how many\nof {rate_count}", "diverged", "best rate", "in steps"],
        [_row(scan) for scan in grid.scans],
        title=f"{grid.name}: {grid.formula}\nconverging: {grid.goal}, in {grid.steps:,} steps",
    )


def _row(scan: RateScan) -> tuple[str, ...]:
    diverged = sum(outcome.diverged_at is not None for outcome in scan.outcomes)
    if scan.best is None:
        return scan.label, "none", "0", f"{diverged}", "", ""
    low, high = scan.converging[0].lr, scan.converging[-1].lr
    return (
        scan.label,
        f"{low:.3g} to {high:.3g}" if high > low else f"{low:.3g}",
        f"{len(scan.converging)}",
        f"{diverged}",
        f"{scan.best.lr:.3g}",
        f"{scan.best.steps_to_converge:,}",
    )


def _as_json(grid: RateGrid) -> dict[str, Any]:
    return {
        "name": grid.name,
        "formula": grid.formula,
        "steps": grid.steps,
        "converging": grid.goal,
        "optimizers": [
            {
                "label": scan.label,
                "optimizer": scan.optimizer,
                "lowest_converging_rate": scan.converging[0].lr if scan.best else None,
                "highest_converging_rate": scan.converging[-1].lr if scan.best else None,
                "best_rate": scan.best.lr if scan.best else None,
                "best_steps": scan.best.steps_to_converge if scan.best else None,
                "runs": [
                    {
                        "lr": outcome.lr,
                        "steps_to_converge": outcome.steps_to_converge,
                        "diverged_at": outcome.diverged_at,
                        "lowest_value": outcome.lowest_value,
                    }
                    for outcome in scan.outcomes
                ],
            }
            for scan in grid.scans
        ],
    }
