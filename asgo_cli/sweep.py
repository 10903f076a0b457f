"""`asgo sweep`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asgo_cli import console
from asgo_cli.export import export_command
from asgo_cli.help_text import examples
from asgo_cli.names import SWEEPS, sweeps_and_files
from asgo_cli.sweep_runs import raise_failures, rounded, train_runs
from pipelines.errors import UsageError
from pipelines.shell import command
from pipelines.tasks import task_of

if TYPE_CHECKING:
    from pipelines.sweeps.definition import SweepRun
    from pipelines.sweeps.queue import Failure
    from pipelines.sweeps.status import RunStatus

EXAMPLES = examples(
    "asgo sweep asro-gpt-paper --dry-run",
    "asgo sweep asgo-nanogpt-paper --seeds 1,2,3 --gpus 4",
    "asgo sweep my.toml --slots 2 --set training.steps=500",
)


def sweep(
    source: Annotated[
        str,
        typer.Argument(
            metavar="NAME|FILE.toml",
            help=f"A shipped sweep ({', '.join(SWEEPS)}), or a file of your own.",
            autocompletion=sweeps_and_files,
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder of the runs.", show_default="runs/NAME")
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(metavar="1,2,3", help="Train every run with each of these seeds.", show_default="the file's"),
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Number of parallel runs.", show_default="one per GPU, or one on the CPU"
        ),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Number of GPUs to use, one run on each.", show_default="all")
    ] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set one key in all runs.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the runs and their cost, and exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan or the results as JSON.")] = False,
) -> None:
    """Train many configurations, or search for the best ones.

    Trains a list or a grid of configurations, or searches for the best settings of each, several runs in parallel. To
    continue after any interruption, give the same command again: finished runs are skipped, partial runs resume. A
    failed run does not stop the others.
    """
    from pipelines.resolve import assignment_layer
    from pipelines.sweeps.definition import read_sweep, resolve_runs
    from pipelines.sweeps.status import run_statuses

    definition = read_sweep(source)
    set_layer, final_seeds = assignment_layer(assignments or []), _parse_seeds(seeds)
    folder = out or Path("runs") / definition.name
    if definition.search is not None:
        from asgo_cli.sweep_search import search
        from pipelines.sweeps.contenders import plan_search

        search(plan_search(definition, set_layer, final_seeds), folder, slots, gpus, dry_run, as_json)
        return
    runs = resolve_runs(definition, set_layer, final_seeds)
    plan = run_statuses(runs, folder)
    if dry_run:
        _show_plan(plan, as_json)
        return
    failures = _train(plan, folder, slots, gpus)
    _show_results(run_statuses(runs, folder), failures, as_json)
    console.suggest_next(export_command(folder), command("asgo", "compare", folder))
    raise_failures(failures)


def _parse_seeds(text: str | None) -> list[int]:
    if text is None:
        return []
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) <= len(str(2**64)) and int(part) < 2**64 for part in parts):
        raise UsageError(f"--seeds {text}: write whole numbers with commas, such as 1,2,3")
    return list(dict.fromkeys(int(part) for part in parts))


def _train(plan: Sequence[RunStatus], folder: Path, slots: int | None, gpus: int | None) -> list[Failure]:
    from pipelines.sweeps.queue import FixedRuns

    left = [run for run in plan if run.state != "done"]
    if len(left) < len(plan):
        console.say(f"{len(plan) - len(left)} of {len(plan)} runs are done already")
    if not left:
        return []
    return train_runs(FixedRuns(left), [run.run for run in left], len(left), folder, slots, gpus)


def _facts(run: SweepRun) -> dict[str, Any]:
    config = run.config
    return {"run": run.name, "seed": config.seed, "optimizer": config.optimizer.name, "lr": config.optimizer.lr}


def _show_plan(plan: Sequence[RunStatus], as_json: bool) -> None:
    total, left = sum(run.tokens for run in plan), sum(run.tokens_left for run in plan)
    unit = task_of(plan[0].run.config).unit
    if as_json:
        rows = [
            {**_facts(run.run), "steps": run.run.config.training.steps, unit: run.tokens, "state": run.state}
            for run in plan
        ]
        console.show_json({"runs": rows, unit: total, f"{unit}_left": left})
        return
    cells = [
        (
            run.run.name,
            run.run.config.optimizer.name,
            f"{run.run.config.optimizer.lr:g}",
            f"{run.run.config.training.steps:,}",
            rounded(run.tokens),
            run.state,
        )
        for run in plan
    ]
    console.show_table(("run", "optimizer", "lr", "steps", unit, "state"), cells)
    console.show_facts([(f"{len(plan)} runs", f"{total:,} {unit}, {left:,} of them left")])
    console.say("dry run: nothing was written")


def _show_results(results: Sequence[RunStatus], failures: Sequence[Failure], as_json: bool) -> None:
    failed = {run.name: run for run in failures}
    metrics = task_of(results[0].run.config).metrics
    rows = [
        {
            **_facts(run.run),
            "state": "failed" if run.run.name in failed else run.state,
            **{f"validation_{metric.name}": last.get(metric.name) for metric in metrics},
            "folder": str(run.folder),
        }
        for run in results
        for last in [run.final_metrics()]
    ]
    if as_json:
        reasons = [{"run": run.name, "reason": run.reason, "log": str(run.log)} for run in failures]
        console.show_json({"runs": rows, "failures": reasons})
        return
    heads = [f"final validation {metric.name}" for metric in metrics]
    cells = [
        (
            row["run"],
            str(row["seed"]),
            *(metric.text(row[f"validation_{metric.name}"]) for metric in metrics),
            row["state"],
        )
        for row in rows
    ]
    console.show_table(("run", "seed", *heads, "state"), cells)
