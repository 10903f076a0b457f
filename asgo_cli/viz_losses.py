"""`asgo viz` on matrix problems: losses over steps, as a figure and a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asgo_cli import console
from asgo_cli.viz_request import Request, progress_bar

if TYPE_CHECKING:
    from pipelines.analysis.matrix_losses import LossRun


def show_losses(request: Request) -> None:
    """Run the optimizers, draw the losses and print the table."""
    from pipelines.analysis.matrix_figure import check_losses_path, write_losses
    from pipelines.analysis.matrix_losses import choose_problems, run_losses
    from pipelines.analysis.optimizer_settings import MATRICES, default_settings, parse_settings

    path = request.path(request.names, "problems")
    check_losses_path(path)
    settings = [parse_settings(text, MATRICES) for text in request.optimizers] or default_settings(MATRICES)
    problems = choose_problems(request.names)
    with progress_bar(sum(request.steps or problem.steps for problem in problems)) as counter:
        panels = [
            run_losses(problem, settings, request.steps, request.seed, counter(problem.name)) for problem in problems
        ]

    write_losses(panels, path)
    if request.as_json:
        console.show_json({"figure": str(path), "problems": [_as_json(runs, request.seed) for runs in panels]})
    else:
        for runs in panels:
            _show(runs, request.seed)
    console.say(f"{path}: losses on {', '.join(request.names)}")
    console.suggest_next(
        f"{request.command} --optimizer asgo:precond_frequency=10 --optimizer shampoo",
        f"{request.command} --lr-grid 1e-3:1:10",
    )


def _show(runs: list[LossRun], seed: int) -> None:
    from pipelines.analysis.matrix_losses import SHARE

    problem, steps, first = runs[0].problem, runs[0].steps, float(runs[0].values[0])
    console.show_table(
        ["", "final loss", "lowest loss", f"stays below\n{SHARE * first:.3g} from step"],
        [(run.settings.label, f"{run.values[-1]:.3g}", f"{run.values.min():.3g}", _arrival(run)) for run in runs],
        title=f"{problem.name}: {problem.formula}\nfrom a loss of {first:.3g} in {steps:,} steps; seed {seed}",
    )


def _arrival(run: LossRun) -> str:
    if run.diverged_at is not None:
        return f"diverged at step {run.diverged_at:,}"
    return "never" if run.steps_to_reach is None else f"{run.steps_to_reach:,}"


def _as_json(runs: list[LossRun], seed: int) -> dict[str, Any]:
    problem = runs[0].problem
    return {
        "problem": problem.name,
        "formula": problem.formula,
        "seed": seed,
        "first_loss": float(runs[0].values[0]),
        "steps": runs[0].steps,
        "runs": [
            {
                "label": run.settings.label,
                "optimizer": run.settings.optimizer,
                "keywords": run.settings.keywords,
                "final_loss": float(run.values[-1]),
                "lowest_loss": float(run.values.min()),
                "steps_to_reach": run.steps_to_reach,
                "diverged_at": run.diverged_at,
            }
            for run in runs
        ],
    }
