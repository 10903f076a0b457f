"""`asgo export-metrics`."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Annotated

import typer

from asgo_cli import console
from asgo_cli.help_text import examples
from pipelines.shell import command

EXAMPLES = examples(
    "asgo export-metrics runs --out metrics.csv",
    "asgo export-metrics runs/asgo --out -    # to stdout",
)


def export_command(folder: Path) -> str:
    """Return the command that exports the metrics of a run or folder of runs to a CSV file with the folder's name."""
    return command("asgo", "export-metrics", folder, "--out", Path(f"{folder.resolve().name}.csv"))


def export_metrics(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint, a run, or a folder of runs.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The CSV file to write; - for stdout.")] = Path(
        "metrics.csv"
    ),
) -> None:
    """Write recorded metrics as CSV.

    One row per recorded step: losses, learning rates and times of a checkpoint, a run, or a folder of runs. Runs of a
    folder that cannot be read are skipped with a warning.
    """
    from pipelines.analysis.export import records, write_csv
    from pipelines.storage import write_output

    found = records(path)
    for line in found.left_out:
        console.warn(f"left out: {line}")
    rows = found.rows
    if str(out) == "-":
        write_csv(rows, sys.stdout)
        return
    text = io.StringIO()
    write_csv(rows, text)
    write_output(out, text.getvalue().encode())
    runs = len({row["run"] for row in rows})
    console.say(f"{out}: {len(rows):,} rows of {runs} run{'s' * (runs > 1)}")
