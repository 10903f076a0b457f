"""`asgo viz`."""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from typing import Annotated

import typer

from asgo_cli.help_text import examples
from asgo_cli.names import OPTIMIZERS, completing
from asgo_cli.options import LARGEST_SEED
from asgo_cli.viz_losses import show_losses
from asgo_cli.viz_rates import show_rates
from asgo_cli.viz_request import Request
from asgo_cli.viz_trajectories import show_trajectories
from pipelines.shell import command

# As in models.functions and models.matrix_problems, which cannot be imported here: it would import torch.
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
MATRIX_PROBLEMS = ("kronecker_quadratic", "matrix_factorization")
_NAMES = ("all", *FUNCTION_NAMES, *MATRIX_PROBLEMS)

EXAMPLES = examples(
    "asgo viz rosenbrock",
    "asgo viz all --out figure.pdf",
    "asgo viz --expression 'x**2 + 10*y**2' --start 4,-3",
    "asgo viz beale --optimizer adam:lr=0.05 --optimizer accasro:lr=0.02",
    "asgo viz beale himmelblau --out page.html",
    "asgo viz kronecker_quadratic --optimizer asgo:lr=0.05 --optimizer adamw",
    "asgo viz abs_sum --lr-grid 1e-4:1:13",
)


FunctionsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="FUNCTION...",
        help=f"Functions of the Asro paper ({', '.join(PAPER_FUNCTIONS)}), or all for these six; "
        f"standard test functions: {', '.join(USUAL_FUNCTIONS)}; "
        f"functions with gradient noise: {', '.join(NOISY_FUNCTIONS)}; "
        f"or matrix problems, for matrix optimizers too: {', '.join(MATRIX_PROBLEMS)}.",
        autocompletion=completing(_NAMES),
    ),
]
ExpressionOption = Annotated[
    str | None,
    typer.Option(
        metavar="FORMULA",
        help="Your own function of x and y, such as 'x**2 + 10*y**2'; it may contain + - * / **, pi, e, abs, "
        "sqrt, exp, log, sin, cos, tan, sinh, cosh, tanh, atan, minimum and maximum.",
    ),
]
OptimizersOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[:lr=0.01,...]",
        help="An optimizer, or an import path such as torch.NAdam, with keywords of its constructor; may be given "
        "several times.",
        show_default="the paper's three settings; for matrix problems six optimizers",
        autocompletion=completing(OPTIMIZERS),
    ),
]
LearningRatesOption = Annotated[
    str | None,
    typer.Option(
        metavar="LOW:HIGH:COUNT",
        help="Show at which learning rates each optimizer converges: COUNT rates, evenly on a log scale.",
    ),
]
OutOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Figure (.png, .pdf, .svg), animation (.gif) or interactive page (.html).",
        show_default="FUNCTION.png or functions.png",
    ),
]


def viz(
    functions: FunctionsArgument = None,
    expression: ExpressionOption = None,
    optimizer: OptimizersOption = None,
    start: Annotated[
        str | None,
        typer.Option(metavar="X,Y", help="Start of every trajectory.", show_default="each function's own"),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Number of steps.", show_default="each function's own")
    ] = None,
    lr_grid: LearningRatesOption = None,
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            max=LARGEST_SEED,
            metavar="N",
            help="Seed of gradient noise and matrix problems.",
        ),
    ] = 0,
    out: OutOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Draw optimizers on test functions and matrix problems.

    Draws trajectories on functions of x and y, and losses over steps on matrix problems. Prints where each trajectory
    ends, and from which step on it stays within 0.1 of an optimum, or its lowest value. For a matrix problem: the final
    loss, and from which step on the loss stays below a thousandth of the first. With --lr-grid: the learning rates
    that achieve this.
    """
    from pipelines.errors import UsageError

    if not functions and expression is None:
        raise UsageError("give a FUNCTION, as in `asgo viz rosenbrock`, or an --expression (see --help)")
    names = _function_names(functions or [])
    of_matrices = [name for name in names if name in MATRIX_PROBLEMS]
    if of_matrices:
        _check_matrix_request(of_matrices, names, expression, start)
    own = [] if expression is None else ["--expression", expression]
    request = Request(
        names=names,
        expression=expression,
        optimizers=optimizer or [],
        start=None if start is None else _parse_start(start),
        steps=steps,
        seed=seed,
        out=out,
        as_json=as_json,
        command=command("asgo", "viz", *(functions or []), *own),
    )
    if lr_grid is not None:
        show_rates(request, lr_grid, of_matrices=bool(of_matrices))
    elif of_matrices:
        show_losses(request)
    else:
        show_trajectories(request)


def _check_matrix_request(of_matrices: list[str], names: list[str], expression: str | None, start: str | None) -> None:
    """Raise `UsageError` if matrix problems are mixed with functions, or given a start."""
    from pipelines.errors import UsageError

    of_points = [name for name in names if name not in MATRIX_PROBLEMS] + (
        [] if expression is None else ["--expression"]
    )
    if of_points:
        raise UsageError(
            f"{of_matrices[0]} is a matrix problem and {of_points[0]} a function of x and y: "
            "draw them with two commands"
        )
    if start is not None:
        raise UsageError(f"--start {start}: {of_matrices[0]} has no x and y; --seed sets its start")


def _function_names(given: list[str]) -> list[str]:
    from pipelines.errors import UsageError

    names: list[str] = []
    for name in given:
        if name not in _NAMES:
            nearest = difflib.get_close_matches(name, _NAMES, n=1)
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
        raise UsageError(f"--start {text}: must be two finite numbers, as in --start -1.5,2")
    return x, y
