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
        help=f"all, for the six of the Asro paper ({', '.join(PAPER_FUNCTIONS)}); any of these; "
        f"of the field's usual ones: {', '.join(USUAL_FUNCTIONS)}; "
        f"of those with noise in the gradient: {', '.join(NOISY_FUNCTIONS)}; "
        f"or problems of matrices, for matrix optimizers too: {', '.join(MATRIX_PROBLEMS)}.",
        autocompletion=completing(_NAMES),
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
        help="An optimizer with keywords of its constructor; may be given several times.",
        show_default="the paper's three settings; on matrices six optimizers",
        autocompletion=completing(OPTIMIZERS),
    ),
]
LearningRatesOption = Annotated[
    str | None,
    typer.Option(
        metavar="LOW:HIGH:COUNT",
        help="Show at which of so many learning rates, evenly on a log scale, each optimizer converges.",
    ),
]
OutOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="The figure: .png, .pdf or .svg; .gif, which moves; or .html, an interactive page.",
        show_default="FUNCTION.png or functions.png",
    ),
]


def viz(
    functions: FunctionsArgument = None,
    expression: ExpressionOption = None,
    optimizer: OptimizersOption = None,
    start: Annotated[
        str | None,
        typer.Option(metavar="X,Y", help="Where every trajectory begins.", show_default="each function's own"),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Length of the runs.", show_default="each function's own")
    ] = None,
    lr_grid: LearningRatesOption = None,
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            max=LARGEST_SEED,
            metavar="N",
            help="Of the noise in noisy functions, and of the matrix problems.",
        ),
    ] = 0,
    out: OutOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Draw optimizers on test functions and matrix problems.

    Draws trajectories on functions of x and y, losses over the steps on problems of matrices. Prints where each
    trajectory ends, and when it has come within 0.1 of an optimum for good, or how low it came; of a matrix problem
    the final loss, and when it has fallen below a thousandth of the first for good. With --lr-grid: which learning
    rates do so.
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
    """A problem of matrices has no plane, and no point to start at."""
    from pipelines.errors import UsageError

    of_points = [name for name in names if name not in MATRIX_PROBLEMS] + (
        [] if expression is None else ["--expression"]
    )
    if of_points:
        raise UsageError(
            f"{of_matrices[0]} is a problem of matrices and {of_points[0]} a function of x and y: "
            "draw them by two commands"
        )
    if start is not None:
        raise UsageError(f"--start {start}: {of_matrices[0]} has no x and y; its start follows from --seed")


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
        raise UsageError(f"--start {text}: it takes two finite numbers, as in --start -1.5,2")
    return x, y
