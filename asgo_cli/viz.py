"""`asgo viz`."""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress

from asgo_cli import console

if TYPE_CHECKING:
    from pipelines.analysis.trajectories import Trajectory, TrajectorySettings

# As in models.functions, which cannot be imported here: it would import torch.
PAPER_FUNCTIONS = ("abs_sum", "inseparable_l1", "inseparable_l2", "abs_sum_div", "beale", "rosenbrock")
USUAL_FUNCTIONS = (
    "himmelblau",
    "booth",
    "matyas",
    "ackley",
    "rastrigin",
    "styblinski_tang",
    "three_hump_camel",
    "goldstein_price",
)
FUNCTION_NAMES = PAPER_FUNCTIONS + USUAL_FUNCTIONS

EXAMPLES = (
    "Examples: `asgo viz rosenbrock`; `asgo viz all --out figure.pdf`; "
    "`asgo viz rosenbrock --optimizer adam:lr=0.05 --optimizer accasro:lr=0.02,increment=0.1 --start -1.5,2`."
)


def viz(
    functions: Annotated[
        list[str],
        typer.Argument(
            metavar="FUNCTION...",
            help=f"all, for the six of the Asro paper ({', '.join(PAPER_FUNCTIONS)}); any of these; "
            f"or of the field's usual ones: {', '.join(USUAL_FUNCTIONS)}.",
            autocompletion=lambda: ["all", *FUNCTION_NAMES],
        ),
    ],
    optimizer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:lr=0.01,...]",
            help="An optimizer with keywords of its constructor; may be given several times. "
            "Without it: the paper's three settings.",
        ),
    ] = None,
    start: Annotated[
        str | None, typer.Option(metavar="X,Y", help="Where every trajectory begins; each function has its own.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Length of the trajectories; each function has its own.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The figure: .png, .pdf or .svg.", show_default="FUNCTION.png or functions.png")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Draw optimizers on 2-D test functions.

    Prints where each trajectory ends, and when it has come within 0.1 of an optimum for good.
    """
    names = _function_names(functions)
    begin = _parse_start(start) if start is not None else None
    path = out or Path(f"{names[0]}.png" if len(names) == 1 else "functions.png")

    from pipelines.analysis.figure_style import check_figure_path
    from pipelines.analysis.trajectories import default_settings, parse_settings

    check_figure_path(path)
    settings = [parse_settings(text) for text in optimizer] if optimizer else default_settings()
    panels = _run(names, settings, begin, steps)

    from pipelines.analysis.trajectory_figure import draw_trajectories

    draw_trajectories(panels, path)
    if as_json:
        console.show_json({"figure": str(path), "functions": [_as_json(trajectories) for trajectories in panels]})
    else:
        for trajectories in panels:
            _show(trajectories)
    console.say(f"{path}: trajectories on {', '.join(names)}")
    console.suggest_next(*_next_commands(functions))


def _function_names(given: list[str]) -> list[str]:
    from pipelines.errors import UsageError

    names: list[str] = []
    for name in given:
        if name not in ("all", *FUNCTION_NAMES):
            nearest = difflib.get_close_matches(name, ["all", *FUNCTION_NAMES], n=1)
            hint = f"did you mean {nearest[0]!r}? " if nearest else ""
            raise UsageError(f"unknown function {name!r}; {hint}`asgo viz --help` lists them")
        names += PAPER_FUNCTIONS if name == "all" else (name,)
    return list(dict.fromkeys(names))


def _parse_start(text: str) -> tuple[float, float]:
    from pipelines.errors import UsageError

    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError:
        x = y = math.nan
    if not (math.isfinite(x) and math.isfinite(y)):
        raise UsageError(f"--start {text}: it takes two finite numbers, as in --start -1.5,2")
    return x, y


def _run(
    names: list[str], settings: list[TrajectorySettings], start: tuple[float, float] | None, steps: int | None
) -> list[list[Trajectory]]:
    from pipelines.analysis.trajectories import run_panels

    with Progress(console=console.words, transient=True, disable=not console.words.is_terminal) as progress:
        bar = progress.add_task("", total=None)

        def show(name: str, done: int, total: int) -> None:
            progress.update(bar, description=name, completed=done, total=total)

        return run_panels(names, settings, start, steps, show)


def _show(trajectories: list[Trajectory]) -> None:
    from pipelines.analysis.trajectories import REACH

    function, steps = trajectories[0].function, trajectories[0].steps
    start, *optima = ("({:g}, {:g})".format(*point) for point in (trajectories[0].points[0], *function.optima))
    console.show_table(
        ["", "final point", "value", "distance", f"stays within\n{REACH} from step"],
        [
            (
                item.settings.label,
                ", ".join(_decimal(coordinate) for coordinate in item.final_point),
                f"{item.final_value:.3g}",
                f"{item.distance:.3g}",
                _arrival(item),
            )
            for item in trajectories
        ],
        title=f"{function.name}: {function.formula}\nfrom {start} to {' or '.join(optima)} in {steps:,} steps",
    )


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
                "steps_to_reach": item.steps_to_reach,
                "diverged_at": item.diverged_at,
            }
            for item in trajectories
        ],
    }


def _next_commands(functions: list[str]) -> list[str]:
    other = f"asgo viz {' '.join(functions)} --optimizer accasro:lr=0.02 --optimizer amsgrad"
    return [other] if functions == ["all"] else [other, "asgo viz all"]
