"""Find run folders and logs of other programs, given directly or inside other folders."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipelines.analysis.comparison.logs.read_log import KINDS, logs_below
from pipelines.errors import UsageError
from pipelines.storage import refuse_file, walk_once
from pipelines.training.run_folder import SEARCH_RECORD, SUPERSEDED, TRIALS, RunFolder

_OWN_FILES = ("config.json", "metrics.jsonl")  # of a run, which is given by its folder


def find_runs(paths: Sequence[Path]) -> dict[str, Path]:
    """Return every run once, by its path relative to the common folder. Raise `UsageError` for a path without runs.

    A path is a run, a log, or a folder with either; in a folder with runs, logs are ignored: they may be of these runs.
    Follows links; a run that is found only through a link has the link's name. A dangling link counts as a run, so
    that the error names it.
    """
    found: dict[Path, Path] = {}
    for run in (run for path in paths for run in _runs_of(path)):
        if run.resolve() not in found or run.resolve() == _absolute(run):
            found[run.resolve()] = run
    names = [_absolute(run) for run in found.values()]
    common = os.path.commonpath([name.parent for name in names])
    return {name.relative_to(common).as_posix(): run for name, run in zip(names, found.values(), strict=True)}


def _absolute(path: Path) -> Path:
    """Return the absolute path without `..`, with links unresolved."""
    return Path(os.path.normpath(path.absolute()))


def is_trial(path: Path) -> bool:
    """Return whether the run is a trial of a search."""
    parent = path.resolve().parent
    return parent.name == TRIALS and (parent / SEARCH_RECORD).is_file()


def contender_of(trial: Path) -> str:
    """Return the name of the contender whose trial it is."""
    return trial.resolve().name.rpartition("-t")[0]


def _is_superseded(path: Path) -> bool:
    """Return whether the run is a final run of a search with settings that are no longer the best."""
    parent = path.resolve().parent
    return parent.name == SUPERSEDED and is_trial(parent)


def _runs_of(path: Path) -> list[Path]:
    if path.is_file():
        if path.name in _OWN_FILES:
            refuse_file(path)
        return [path]
    if not path.is_dir():
        raise UsageError(f"{path}: no such folder or log; give runs, logs, or folders of them")
    runs = [path] if _is_run(path) else [run for run in runs_below(path) if not _is_superseded(run)]
    runs = runs or logs_below(path)
    if not runs:
        raise UsageError(f"{path}: neither a run nor a folder of runs, nor a log ({KINDS}) or a folder of logs")
    return runs


def is_log(path: Path) -> bool:
    """Return whether a path that `find_runs` found is a log."""
    return path.is_file() or (path.is_dir() and not RunFolder(path).exists())


def _is_run(path: Path) -> bool:
    # `config.json` alone is not enough: a model exported for other programs has one too.
    folder = RunFolder(path)
    return folder.exists() and (folder.metrics_path.is_file() or folder.checkpoints.is_dir())


def runs_below(path: Path) -> list[Path]:
    """Return the runs in a folder and its subfolders, linked ones included, sorted by path."""
    return sorted(_walk(path))


def _walk(path: Path) -> Iterator[Path]:
    for here, folders, files in walk_once(path):
        if _is_run(here):
            folders.clear()  # do not search inside a run
            yield here
        else:
            folders.sort()
            yield from (link for link in map(here.joinpath, files) if link.is_symlink() and not link.exists())
