"""The run folders that a user names, one by one or by a folder that holds them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipelines.errors import UsageError
from pipelines.sweeps.folders import SEARCH_RECORD, TRIALS
from pipelines.training.run_folder import RunFolder


def find_runs(paths: Sequence[Path]) -> dict[str, Path]:
    """Every run, once, by its path below the folder that all share; `UsageError` for a path without any."""
    found = {run.resolve(): run for path in paths for run in _runs_of(path)}
    common = os.path.commonpath([run.parent for run in found])
    return {run.relative_to(common).as_posix(): path for run, path in found.items()}


def is_trial(path: Path) -> bool:
    """Whether a search made the run, to find its settings."""
    parent = path.resolve().parent
    return parent.name == TRIALS and (parent / SEARCH_RECORD).is_file()


def _runs_of(path: Path) -> list[Path]:
    if not path.is_dir():
        raise UsageError(f"{path}: no such folder; give runs, or folders of runs")
    runs = [path] if _is_run(path) else sorted(_runs_below(path))
    if not runs:
        raise UsageError(f"{path}: neither a run nor a folder of runs")
    return runs


def _is_run(path: Path) -> bool:
    # A model exported for other programs has a `config.json` too.
    folder = RunFolder(path)
    return folder.exists() and (folder.metrics_path.is_file() or folder.checkpoints.is_dir())


def _runs_below(path: Path) -> Iterator[Path]:
    for place, folders, _files in os.walk(path):
        if _is_run(Path(place)):
            folders.clear()  # what a run holds is its own
            yield Path(place)
