"""The command line."""

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
_OURS = ("asgo_cli", "models", "optim", "pipelines")


def _put_own_packages_first() -> None:
    """Move entries that would shadow our packages (PYTHONPATH=. in a project with `models`) to the end of the path.

    Called here because every program of ours imports this package first. Child processes inherit the path.
    """
    shadows = [place for place in sys.path if _shadows(Path(place))]
    if shadows:
        first = [place for place in sys.path if place not in shadows]
        sys.path[:] = [*first, *([] if str(_ROOT) in first else [str(_ROOT)]), *shadows]


def _shadows(place: Path) -> bool:
    try:
        found = any((place / name).is_dir() or (place / f"{name}.py").is_file() for name in _OURS)
        return found and place.resolve() != _ROOT
    except OSError:  # a deleted working directory, a folder without permission
        return False


_put_own_packages_first()
