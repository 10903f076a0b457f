"""The run folders that a user names, one by one or by a folder that holds them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipelines.errors import UsageError
from pipelines.storage import refuse_file
from pipelines.training.run_folder import SEARCH_RECORD, TRIALS, RunFolder


def find_runs(paths: Sequence[Path]) -> dict[str, Path]:
    """Every run, once, by its path below the folder that all share; `UsageError` for a path without any.

    Links are followed, and a run that is not there itself goes by the name of its link. One that leads nowhere counts
    as a run, to be named when it cannot be read.
    """
    found: dict[Path, Path] = {}
    for run in (run for path in paths for run in _runs_of(path)):
        if run.resolve() not in found or run.resolve() == _absolute(run):
            found[run.resolve()] = run
    names = [_absolute(run) for run in found.values()]
    common = os.path.commonpath([name.parent for name in names])
    return {name.relative_to(common).as_posix(): run for name, run in zip(names, found.values(), strict=True)}


def _absolute(path: Path) -> Path:
    """Without `..`, and with links as they are named."""
    return Path(os.path.normpath(path.absolute()))


def is_trial(path: Path) -> bool:
    """Whether a search made the run, to find its settings."""
    parent = path.resolve().parent
    return parent.name == TRIALS and (parent / SEARCH_RECORD).is_file()


def _runs_of(path: Path) -> list[Path]:
    refuse_file(path)
    if not path.is_dir():
        raise UsageError(f"{path}: no such folder; give runs, or folders of runs")
    runs = [path] if _is_run(path) else runs_below(path)
    if not runs:
        raise UsageError(f"{path}: neither a run nor a folder of runs")
    return runs


def _is_run(path: Path) -> bool:
    # A model exported for other programs has a `config.json` too.
    folder = RunFolder(path)
    return folder.exists() and (folder.metrics_path.is_file() or folder.checkpoints.is_dir())


def runs_below(path: Path) -> list[Path]:
    """The runs in a folder and its folders, linked ones too, in the order of their names."""
    return sorted(_walk(path))


def _walk(path: Path) -> Iterator[Path]:
    entered: set[Path] = set()  # a link may lead back to where it was met
    for place, folders, files in os.walk(path, followlinks=True):
        here = Path(place)
        if here.resolve() in entered:
            folders.clear()
            continue
        entered.add(here.resolve())
        if _is_run(here):
            folders.clear()  # what a run holds is its own
            yield here
        else:
            folders.sort()
            yield from (link for link in map(here.joinpath, files) if link.is_symlink() and not link.exists())
