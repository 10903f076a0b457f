"""`asgo sweep`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from asgo_cli import console
from asgo_cli.export import export_command
from asgo_cli.help_text import examples
from asgo_cli.launch import Launch
from asgo_cli.names import SWEEPS, sweeps_and_files
from asgo_cli.slurm import SlurmJobs, SlurmOption, submit_runs
from asgo_cli.sweep_runs import raise_failures, run_facts, show_plan, train_runs
from pipelines.errors import UsageError
from pipelines.shell import command
from pipelines.tasks import task_of

if TYPE_CHECKING:
    from pipelines.sweeps.definition import Sweep, SweepRun
    from pipelines.sweeps.queue import Failure
    from pipelines.sweeps.status import RunStatus
    from pipelines.sweeps.until_certain import SeedWish

EXAMPLES = examples(
    "asgo sweep asro-gpt-paper --dry-run",
    "asgo sweep asgo-nanogpt-paper --seeds 1,2,3 --gpus 4",
    "asgo sweep my.toml --slots 2 --set training.steps=500",
    "asgo sweep my.toml --until-certain --max-seeds 10 --against adamw",
)


SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="NAME|FILE.toml",
        help=f"A shipped sweep ({', '.join(SWEEPS)}), or a file of your own.",
        autocompletion=sweeps_and_files,
    ),
]
SlotsOption = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Number of parallel runs.", show_default="one per GPU, or one on the CPU"),
]
UntilCertainOption = Annotated[
    bool, typer.Option("--until-certain", help="Add seeds to the runs of undecided pairs, until all are decided.")
]
MaxSeedsOption = Annotated[
    int | None, typer.Option(min=2, max=100, metavar="N", help="Seeds at most, until certain.", show_default="8")
]
AgainstOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Compare all other runs with this one only.", show_default="all pairs"),
]

WorkerOption = Annotated[
    int | None,
    typer.Option(min=0, metavar="K", help="Number of this command, if several work on one search in one folder."),
]
OutOption = Annotated[Path | None, typer.Option(metavar="FOLDER", help="Folder of the runs.", show_default="runs/NAME")]
SeedsOption = Annotated[
    str | None,
    typer.Option(metavar="1,2,3", help="Train every run with each of these seeds.", show_default="the file's"),
]
GpusOption = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Number of GPUs to use, one run on each.", show_default="all")
]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set one key in all runs.")]


def sweep(
    source: SourceArgument,
    out: OutOption = None,
    seeds: SeedsOption = None,
    slots: SlotsOption = None,
    gpus: GpusOption = None,
    assignments: SetOption = None,
    until_certain: UntilCertainOption = False,
    max_seeds: MaxSeedsOption = None,
    against: AgainstOption = None,
    slurm: SlurmOption = None,
    worker: WorkerOption = None,
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

    if not until_certain and (max_seeds, against) != (None, None):
        raise UsageError("--max-seeds and --against are for --until-certain")
    definition = read_sweep(source)
    set_layer, final_seeds = assignment_layer(assignments or []), _parse_seeds(seeds)
    folder = out or Path("runs") / definition.name
    jobs = None if slurm is None else SlurmJobs.of(slurm, Launch(processes=slots))
    if jobs is not None and (slots or gpus) and (until_certain or definition.search is None):
        raise UsageError("--slots and --gpus: with --slurm, every run is a job; write gpus=N and jobs=N in --slurm")
    if until_certain:
        from asgo_cli.sweep_until import submit_until_certain, sweep_until_certain
        from pipelines.sweeps.until_certain import SeedWish

        if worker is not None:
            raise UsageError("--worker: for the trials of a search; leave out --until-certain until they have ended")
        wish = SeedWish(final_seeds, max_seeds, against)
        if jobs is not None:
            submit_until_certain(jobs, definition, set_layer, wish, folder, dry_run, as_json)
        else:
            sweep_until_certain(definition, set_layer, wish, folder, slots, gpus, dry_run, as_json)
        return
    if definition.search is not None:
        from asgo_cli.sweep_search import search
        from pipelines.sweeps.contenders import plan_search

        search(plan_search(definition, set_layer, final_seeds), folder, slots, gpus, dry_run, as_json, worker, jobs)
        return
    if worker is not None:
        raise UsageError("--worker: for a search; the runs of this sweep need no workers")
    _sweep_list(resolve_runs(definition, set_layer, final_seeds), folder, slots, gpus, dry_run, as_json, jobs)


def _sweep_list(
    runs: Sequence[SweepRun],
    folder: Path,
    slots: int | None,
    gpus: int | None,
    dry_run: bool,
    as_json: bool,
    jobs: SlurmJobs | None,
) -> None:
    from pipelines.sweeps.status import run_statuses
    from pipelines.sweeps.until_certain import require_recorded_seeds

    require_recorded_seeds(((run.variant, run.config.seed) for run in runs), folder)
    plan = run_statuses(runs, folder)
    if jobs is not None:
        submit_runs(jobs, plan, folder, dry_run, as_json)
        return
    if dry_run:
        show_plan(plan, as_json)
        return
    failures = _train(plan, folder, slots, gpus)
    _show_results(run_statuses(runs, folder), failures, as_json)
    console.suggest_next(export_command(folder), command("asgo", "compare", folder))
    raise_failures(failures)


def train_sweep(definition: Sweep, folder: Path, slots: int | None, gpus: int | None, wish: SeedWish | None) -> None:
    """Train what is missing of a sweep, with `wish` until certain; raise `AsgoError` if some runs have not ended.

    A run that diverged has ended: it is not trained again.
    """
    from pipelines.resolve import assignment_layer
    from pipelines.sweeps.definition import resolve_runs
    from pipelines.sweeps.status import run_statuses
    from pipelines.sweeps.until_certain import require_recorded_seeds

    nothing_set = assignment_layer([])
    if wish is not None:
        from asgo_cli.sweep_until import train_until_certain

        _, _, failures = train_until_certain(definition, nothing_set, wish, folder, slots, gpus)
        raise_failures(failures)
    elif definition.search is not None:
        from asgo_cli.sweep_search import train_search
        from pipelines.sweeps.contenders import plan_search

        train_search(plan_search(definition, nothing_set), folder, slots, gpus)
    else:
        resolved = resolve_runs(definition, nothing_set)
        require_recorded_seeds(((run.variant, run.config.seed) for run in resolved), folder)
        runs = run_statuses(resolved, folder)
        failures = _train([run for run in runs if not run.diverged], folder, slots, gpus)
        diverged = {run.run.name for run in runs if run.diverged}
        raise_failures([failure for failure in failures if failure.name not in diverged])


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


def _show_results(results: Sequence[RunStatus], failures: Sequence[Failure], as_json: bool) -> None:
    failed = {run.name: run for run in failures}
    metrics = task_of(results[0].run.config).metrics
    rows = [
        {
            **run_facts(run.run),
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
