"""Recorded metrics of checkpoints and runs as CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pipelines.analysis.comparison.find_runs import runs_below
from pipelines.errors import AsgoError, UsageError
from pipelines.storage import csv_cell, refuse_file
from pipelines.training.metrics import Row
from pipelines.training.run_folder import RunFolder

_LEADING = (
    "run", "optimizer", "step", "epoch", "tokens", "samples", "split", "loss", "accuracy", "lr", "grad_norm",
    "step_ms", "optimizer_ms", "throughput", "elapsed_s",
)  # fmt: skip
"""The columns with a guaranteed order; the other columns of `Row` follow."""


@dataclass(frozen=True)
class Records:
    """Records that could be read, and lines about those that could not."""

    rows: list[dict[str, object]]
    """Records, with the run's name and optimizer."""
    left_out: list[str]
    """A line for each damaged run of a folder."""


def records(path: Path) -> Records:
    """Return the records of a checkpoint, a run, or all runs under a folder. Leaves out damaged runs of a folder.

    Raises `UsageError` if `path` is none of these, and `AsgoError` if it, or every run of the folder, is damaged.
    """
    left_out: list[str] = []
    rows = list(_records(path, left_out))
    if not rows:
        raise AsgoError("\n".join(left_out) or f"{path}: nothing has been recorded yet")
    return Records(rows, left_out)


def write_csv(rows: Iterable[dict[str, object]], file: IO[str]) -> None:
    """Write records with a header, in the units of `Row`; floats read back exactly."""
    columns = list(dict.fromkeys((*_LEADING, *Row.__annotations__)))
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: csv_cell(value) for key, value in row.items()} for row in rows)


def _records(path: Path, left_out: list[str]) -> Iterator[dict[str, object]]:
    refuse_file(path)
    if not path.is_dir():
        raise UsageError(f"{path}: no such folder; give a checkpoint, a run, or a folder of runs")
    if (path / "state.json").is_file():
        yield from _checkpoint_records(path)
        return
    if RunFolder(path).exists():
        yield from _run_records(RunFolder(path), path.resolve().name)
        return
    runs = [RunFolder(found.parent) for found in _configs(path)]
    if not runs:
        raise UsageError(f"{path}: neither a checkpoint, nor a run, nor a folder of runs")
    for run in runs:
        try:
            yield from _run_records(run, run.path.relative_to(path).as_posix())
        except AsgoError as error:
            left_out.append(str(error))
        except OSError as error:
            left_out.append(f"{error.filename}: {error.strerror}")


def _run_records(run: RunFolder, name: str) -> Iterator[dict[str, object]]:
    yield from _named(name, run.config().optimizer.name, run.rows())


def _configs(path: Path) -> list[Path]:
    return [run / "config.json" for run in runs_below(path) if (run / "metrics.jsonl").is_file()]


def _checkpoint_records(folder: Path) -> Iterator[dict[str, object]]:
    from pipelines.training.checkpoint import open_checkpoint  # imports torch, which the export of a run does not need

    checkpoint = open_checkpoint(folder)
    # <run>/checkpoints/step-00000100 is named after the run; a checkpoint copied elsewhere has its own name.
    resolved = folder.resolve()
    name = resolved.parents[1].name if resolved.parent.name == "checkpoints" else resolved.name
    yield from _named(name, checkpoint.config().optimizer.name, checkpoint.rows())


def _named(name: str, optimizer: str, rows: list[Row]) -> Iterator[dict[str, object]]:
    for row in rows:
        yield {"run": name, "optimizer": optimizer, **row}
