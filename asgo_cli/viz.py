"""`asgo viz`."""

from __future__ import annotations

import difflib
import math
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress

from asgo_cli import console

if TYPE_CHECKING:
    from pipelines.analysis.trajectories import TestFunction, Trajectory, TrajectorySettings

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
    "mccormick",
    "levy13",
    "saddle",
    "narrow_valley",
)
NOISY_FUNCTIONS = ("noisy_abs_sum", "noisy_inseparable_l2", "noisy_rosenbrock")
FUNCTION_NAMES = PAPER_FUNCTIONS + USUAL_FUNCTIONS + NOISY_FUNCTIONS

EXAMPLES = (
    "Examples: `asgo viz rosenbrock`; `asgo viz all --out figure.pdf`; "
    "`asgo viz --expression 'x**2 + 10*y**2' --start 4,-3`; "
    "`asgo viz rosenbrock --optimizer adam:lr=0.05 --optimizer accasro:lr=0.02,increment=0.1 --start -1.5,2`."
)


FunctionsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="FUNCTION...",
        help=f"all, for the six of the Asro paper ({', '.join(PAPER_FUNCTIONS)}); any of these; "
        f"of the field's usual ones: {', '.join(USUAL_FUNCTIONS)}; "
        f"or of those with noise in the gradient: {', '.join(NOISY_FUNCTIONS)}.",
        autocompletion=lambda: ["all", *FUNCTION_NAMES],
    ),
]
ExpressionOption = Annotated[
    str | None,
    typer.Option(
        metavar="FORMULA",
        help="A function of your own, of x and y, as in 'x**2 + 10*y**2'; it may hold + - * / **, pi, e, abs, "
        "sqrt, exp, log, sin, cos, tan, sinh, cosh, tanh, atan, minimum and maximum.",
    ),
]
OptimizersOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[:lr=0.01,...]",
        help="An optimizer with keywords of its constructor; may be given several times. "
        "Without it: the paper's three settings.",
    ),
]


def viz(
    functions: FunctionsArgument = None,
    expression: ExpressionOption = None,
    optimizer: OptimizersOption = None,
    start: Annotated[
        str | None, typer.Option(metavar="X,Y", help="Where every trajectory begins; each function has its own.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Length of the trajectories; each function has its own.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise in the noisy functions.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The figure: .png, .pdf, .svg or .gif, which moves.", show_default="FUNCTION.png or functions.png"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Draw optimizers on 2-D test functions.

    Prints where each trajectory ends, and when it has come within 0.1 of an optimum for good, or how low it came.
    """
    from pipelines.errors import UsageError

    if not functions and expression is None:
        raise UsageError("give a FUNCTION, as in `asgo viz rosenbrock`, or an --expression (see --help)")
    names = _function_names(functions or [])
    begin = _parse_start(start) if start is not None else None

    from pipelines.analysis.trajectories import choose_functions, default_settings, parse_settings
    from pipelines.analysis.trajectory_animation import check_trajectories_path, write_trajectories

    chosen = choose_functions(names, expression)
    path = out or Path(f"{chosen[0].name}.png" if len(chosen) == 1 else "functions.png")
    check_trajectories_path(path)
    settings = [parse_settings(text) for text in optimizer] if optimizer else default_settings()
    panels = _run(chosen, settings, begin, steps, seed)

    write_trajectories(panels, path)
    if as_json:
        console.show_json({"figure": str(path), "functions": [_as_json(trajectories) for trajectories in panels]})
    else:
        for trajectories in panels:
            _show(trajectories)
    console.say(f"{path}: trajectories on {', '.join(function.name for function in chosen)}")
    console.suggest_next(*_next_commands(functions or [], expression))


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
    functions: Sequence[TestFunction],
    settings: list[TrajectorySettings],
    start: tuple[float, float] | None,
    steps: int | None,
    seed: int,
) -> list[list[Trajectory]]:
    from pipelines.analysis.trajectories import run_panels

    with Progress(console=console.words, transient=True, disable=not console.words.is_terminal) as progress:
        bar = progress.add_task("", total=None)

        def show(name: str, done: int, total: int) -> None:
            progress.update(bar, description=name, completed=done, total=total)

        return run_panels(functions, settings, start, steps, seed, show)


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
    """What tells how good a trajectory is: how near to the optimum, or how low where that is unknown."""
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
                "steps_to_reach": item.steps_to_reach,
                "lowest_point": item.lowest_point,
                "lowest_value": float(item.values.min()),
                "diverged_at": item.diverged_at,
            }
            for item in trajectories
        ],
    }


def _next_commands(functions: list[str], expression: str | None) -> list[str]:
    own = [] if expression is None else ["--expression", shlex.quote(expression)]
    other = " ".join(["asgo viz", *functions, *own, "--optimizer accasro:lr=0.02 --optimizer amsgrad"])
    return [other] if functions == ["all"] else [other, "asgo viz all"]
