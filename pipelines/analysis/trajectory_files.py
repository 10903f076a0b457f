"""Trajectories in a file of the kind that its name says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipelines.analysis.figure_style import check_figure_path
from pipelines.analysis.trajectories import Trajectory
from pipelines.analysis.trajectory_animation import animate_trajectories
from pipelines.analysis.trajectory_figure import draw_trajectories
from pipelines.analysis.trajectory_page import write_trajectory_page
from pipelines.errors import UsageError

_OTHERS = {".gif": animate_trajectories, ".html": write_trajectory_page}


def check_trajectories_path(path: Path) -> None:
    """Raise `UsageError` unless `write_trajectories` can write a file of this name."""
    if path.suffix.lower() not in _OTHERS:
        try:
            check_figure_path(path)
        except UsageError as error:
            raise UsageError(f"{error}, {', '.join(_OTHERS)}") from None


def write_trajectories(panels: Sequence[Sequence[Trajectory]], path: Path) -> None:
    """Write the panels as a figure, as an animation (.gif) or as an interactive page (.html)."""
    _OTHERS.get(path.suffix.lower(), draw_trajectories)(panels, path)
