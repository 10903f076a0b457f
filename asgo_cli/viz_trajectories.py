"""`asgo viz` on 2-D functions: trajectories, as a figure and a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from asgo_cli import console
from asgo_cli.viz_request import Request, progress_bar

if TYPE_CHECKING:
    from pipelines.analysis.trajectories import TestFunction, Trajectory


def show_trajectories(request: Request) -> None:
    """Run the optimizers, draw the trajectories and print the table."""
    from pipelines.analysis.optimizer_settings import default_settings, parse_settings
    from pipelines.analysis.trajectories import choose_functions, run_trajectories
    from pipelines.analysis.trajectory_page import check_trajectories_path, write_trajectories

    functions = choose_functions(request.names, request.expression)
    names = [function.name for function in functions]
    path = request.path(names, "functions")
    check_trajectories_path(path)
    settings = [parse_settings(text) for text in request.optimizers] or default_settings()
    with progress_bar(sum(request.steps or function.steps for function in functions)) as counter:
        panels = [
            run_trajectories(function, settings, request.start, request.steps, request.seed, counter(function.name))
            for function in functions
        ]

    write_trajectories(panels, path)
    if request.as_json:
        console.show_json({"figure": str(path), "functions": [_as_json(trajectories) for trajectories in panels]})
    else:
        for trajectories in panels:
            _show(trajectories)
    console.say(f"{path}: trajectories on {', '.join(names)}")
    others = [] if request.command == "asgo viz all" else ["asgo viz all"]
    console.suggest_next(
        f"{request.command} --optimizer accasro:lr=0.02 --optimizer amsgrad",
        f"{request.command} --lr-grid 1e-4:1:13",
        *others,
    )


def _show(trajectories: list[Trajectory]) -> None:
    function, steps = trajectories[0].function, trajectories[0].steps
    start, *optima = (_point(point) for point in (trajectories[0].points[0], *function.optima))
    way = f"from {start} to {' or '.join(optima)}" if optima else f"from {start}"
    noise = f"; gradient noise {function.noise:g}" if function.noise else ""
    columns, describe = _columns(function)
    console.show_table(
        ["", "final point", "value", *columns],
        [
            (
                item.settings.label,
                ", ".join(_decimal(coordinate) for coordinate in item.final_point),
                f"{item.final_value:.3g}",
                *describe(item),
            )
            for item in trajectories
        ],
        title=f"{function.name}: {function.formula}{noise}\n{way} in {steps:,} steps",
    )


def _columns(function: TestFunction) -> tuple[list[str], Callable[[Trajectory], list[str]]]:
    """Return column heads and their cells: distance to the optimum, or the lowest value if no optimum is known."""
    from pipelines.analysis.trajectories import REACH

    if function.optima:
        return ["distance", f"stays within\n{REACH} from step"], lambda item: [f"{item.distance:.3g}", _arrival(item)]
    return ["lowest value", "at step"], lambda item: [f"{item.values.min():.3g}", _lowest(item)]


def _point(point: Iterable[float]) -> str:
    return "({:g}, {:g})".format(*point)


def _lowest(trajectory: Trajectory) -> str:
    step = f"{trajectory.lowest_step:,}"
    return step if trajectory.diverged_at is None else f"{step}; diverged at {trajectory.diverged_at:,}"


def _arrival(trajectory: Trajectory) -> str:
    if trajectory.diverged_at is not None:
        return f"diverged at step {trajectory.diverged_at:,}"
    return "never" if trajectory.steps_to_reach is None else f"{trajectory.steps_to_reach:,}"


def _decimal(value: float) -> str:
    return f"{value:z.4f}" if abs(value) < 1e4 else f"{value:.3g}"


def _as_json(trajectories: list[Trajectory]) -> dict[str, Any]:
    function = trajectories[0].function
    return {
        "function": function.name,
        "formula": function.formula,
        "gradient_noise": function.noise,
        "start": trajectories[0].points[0].tolist(),
        "optima": function.optima,
        "steps": trajectories[0].steps,
        "trajectories": [
            {
                "label": item.settings.label,
                "optimizer": item.settings.optimizer,
                "keywords": item.settings.keywords,
                "final_point": item.final_point,
                "final_value": item.final_value,
                "distance": item.distance if math.isfinite(item.distance) else None,
                "late_distance": item.late_distance if math.isfinite(item.late_distance) else None,
                "steps_to_reach": item.steps_to_reach,
                "lowest_point": item.lowest_point,
                "lowest_value": float(item.values.min()),
                "diverged_at": item.diverged_at,
            }
            for item in trajectories
        ],
    }
