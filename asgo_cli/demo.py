"""`asgo demo`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from asgo_cli import console
from asgo_cli.help_text import examples
from asgo_cli.progress import TrainingProgress
from pipelines.shell import command

EXAMPLES = examples(
    "asgo demo",
    "asgo demo --out /tmp/demo",
)


def demo(
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Folder for data, runs and figures; finished parts are kept.")
    ] = Path("runs/demo"),
) -> None:
    """Try the whole program in three minutes.

    Tokenizes the Python sources of the standard library, trains a small GPT with three optimizers from one seed,
    exports the metrics, and draws losses and trajectories. Needs no network. A second call shows the same results.
    """
    from pipelines.demo import run_demo

    began = time.monotonic()
    console.say(f"reading the Python sources of the standard library, by bytes → {out / 'data'}")
    runs = run_demo(out, TrainingProgress)
    console.show_table(
        ("optimizer", "first val loss", "final val loss", "tokens/s", "optimizer ms/step"),
        [
            (
                run.optimizer,
                f"{run.losses('val')[0]:.3f}",
                f"{run.losses('val')[-1]:.3f}",
                f"{run.median('throughput'):,.0f}",
                f"{run.median('optimizer_ms'):.1f}",
            )
            for run in sorted(runs, key=lambda run: run.losses("val")[-1])
        ],
        title="A GPT on Python's own sources, validation loss in nats a byte",
    )
    console.say(f"{out / 'losses.png'}, {out / 'rosenbrock.png'}, {out / 'metrics.csv'}")
    console.say(f"done in {time.monotonic() - began:.0f} s")
    best = min(runs, key=lambda run: run.losses("val")[-1])
    console.suggest_next(
        command("asgo", "generate", best.folder, "--prompt", "def "),
        command("asgo", "train", "gpt", "--preset", "tiny", "--data", out / "data", "--optimizer", "muon"),
        "asgo viz all",
    )
