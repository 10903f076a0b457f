"""What a list of runs and a search have in common in `asgo sweep`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asgo_cli import console
from asgo_cli.launch import own_path
from asgo_cli.worker import is_worker
from pipelines.errors import AsgoError, UsageError
from pipelines.tasks import task_of

if TYPE_CHECKING:
    from pipelines.sweeps.definition import SweepRun
    from pipelines.sweeps.queue import Failure, Program, Source
    from pipelines.sweeps.status import RunStatus


def train_runs(
    source: Source,
    like: Sequence[SweepRun],
    count: int | str,
    folder: Path,
    slots: int | None,
    gpus: int | None,
    worker: int | None = None,
) -> list[Failure]:
    """Train `count` runs of the source, whose data and devices are those of the runs `like`; return the failures."""
    from asgo_cli.sweep_progress import SweepProgress
    from pipelines.sweeps.queue import carry_out
    from pipelines.sweeps.slots import make_slots
    from pipelines.sweeps.status import check_data

    if is_worker():
        raise UsageError("asgo sweep starts its own processes; run it without torchrun")
    check_data(like)
    on_gpus = any(run.config.runtime.device in ("auto", "cuda") for run in like)
    places = make_slots(slots, gpus, on_gpus)
    with SweepProgress(count) as progress:
        return carry_out(source, folder, places, _program(), progress, worker)


def _program() -> Program:
    """Return the program that trains a run: this `asgo`."""
    from pipelines.sweeps.queue import Program

    return Program([sys.executable, "-m", "asgo_cli.sweep_child", str(os.getpid())], own_path())


def raise_failures(failures: Sequence[Failure]) -> None:
    """Raise `AsgoError` with a line per failure, if there are any."""
    if failures:
        raise AsgoError("\n".join(f"run {run.name} failed: {run.reason}; its log: {run.log}" for run in failures))


def rounded(count: int) -> str:
    """Return the count with four digits and B or M, to fit a narrow terminal."""
    for size, letter in ((10**9, "B"), (10**6, "M")):
        if count >= size:
            return f"{count / size:.4g} {letter}"
    return f"{count:,}"


def run_facts(run: SweepRun) -> dict[str, Any]:
    """Return what identifies a run, for JSON."""
    config = run.config
    return {"run": run.name, "seed": config.seed, "optimizer": config.optimizer.name, "lr": config.optimizer.lr}


def show_plan(plan: Sequence[RunStatus], as_json: bool, most: Sequence[RunStatus] = ()) -> None:
    """Show the runs and their cost, and that of `most`, if results decide how many are trained."""
    total, left = sum(run.tokens for run in plan), sum(run.tokens_left for run in plan)
    unit = task_of(plan[0].run.config).unit
    if as_json:
        rows = [
            {**run_facts(run.run), "steps": run.run.config.training.steps, unit: run.tokens, "state": run.state}
            for run in plan
        ]
        limit = {"runs_at_most": len(most), f"{unit}_at_most": sum(run.tokens for run in most)} if most else {}
        console.show_json({"runs": rows, unit: total, f"{unit}_left": left, **limit})
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
    for head, runs in (("", plan), ("at most ", most)):
        if runs:
            total, left = sum(run.tokens for run in runs), sum(run.tokens_left for run in runs)
            console.show_facts([(f"{head}{len(runs)} runs", f"{total:,} {unit}, {left:,} of them left")])
    console.say("dry run: nothing was written")
