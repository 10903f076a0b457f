"""The contender and the seed of a run, from its name."""

from __future__ import annotations

import re
from pathlib import Path

_SEED = re.compile(r"(?<![A-Za-z0-9])(?:seed|s)[-_=. ]?(\d{1,18})(?![A-Za-z0-9])", re.IGNORECASE)
_SAYS_NOTHING = re.compile(
    r"(?:logs?|main|train|training|trainer_state|out|output|stdout|console|metrics|history|progress|results?|tensorboard"
    r"|runs?|lightning_logs|(?:run|version|checkpoint)?[-_]?\d+|[0-9a-f]{8}(?:-?[0-9a-f]{4}){3}-?[0-9a-f]{12})",
    re.IGNORECASE,
)
"""Parts of a path that name no contender: usual names of log files, numbers, and UUIDs."""
SUFFIXES = (".csv", ".tsv", ".txt", ".log", ".json")


def split_name(name: str) -> tuple[str, int | None]:
    """Return the contender in a name, or relative path, and the seed: `("adamw", 1)` for `adamw-s1.csv`.

    The contender is empty if the name says nothing else. The last seed in the name counts.
    """
    path = name.strip()
    for suffix in SUFFIXES:
        path = path.removesuffix(suffix)
    seeds = list(_SEED.finditer(path))
    if seeds:
        path = path[: seeds[-1].start()] + path[seeds[-1].end() :]
    parts = [part.strip(" -_.") for part in path.split("/")]
    kept = [part for part in parts if part and not _SAYS_NOTHING.fullmatch(part)]
    return "/".join(kept), int(seeds[-1][1]) if seeds else None


def split_path(name: str, path: Path) -> tuple[str, int | None]:
    """Return contender and seed of a log by its `name`, its relative path; or else by the folders that hold it."""
    contender, seed = split_name(name)
    folders = path.absolute().parents
    outer = next((text for folder in folders if (text := split_name(folder.name)[0])), path.name)
    return contender or outer, seed
