"""Trajectories on test functions as an interactive page, and the choice of the file format by suffix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from models.functions import Point, TestFunction
from pipelines.analysis.figure_style import OPTIMUM_COLOUR, START_COLOUR, check_figure_path
from pipelines.analysis.trajectories import Trajectory
from pipelines.analysis.trajectory_animation import animate_trajectories, frame_steps
from pipelines.analysis.trajectory_figure import (
    CONTOUR_COLOURS,
    LEVELS,
    Window,
    approached_goal,
    draw_trajectories,
    enclose,
    goals,
    line_width,
    relief_in,
)
from pipelines.analysis.viz_page import GRID_COLOUR, PagePanel, line, short, value_axis, value_curve, write_page

Array = npt.NDArray[np.float64]

_FINENESS = 1 / 700  # of the plane's side: about a pixel
_VALUE_AXES = {"xaxis": "x2", "yaxis": "y2", "showlegend": False}


def check_trajectories_path(path: Path) -> None:
    """Raise `UsageError` unless `write_trajectories` can write a file of this name."""
    if path.suffix.lower() not in (".gif", ".html"):
        check_figure_path(path, ", .gif, .html")


def write_trajectories(panels: Sequence[Sequence[Trajectory]], path: Path) -> None:
    """Write the panels as a figure, as an animation (.gif) or as an interactive page (.html)."""
    writers = {".gif": animate_trajectories, ".html": write_trajectory_page}
    writers.get(path.suffix.lower(), draw_trajectories)(panels, path)


def write_trajectory_page(panels: Sequence[Sequence[Trajectory]], path: Path) -> None:
    """Write a page with a panel per function; all trajectories of a panel start at the same point."""
    write_page([trajectory_panel(trajectories) for trajectories in panels], path)


def trajectory_panel(trajectories: Sequence[Trajectory]) -> PagePanel:
    """Return a panel: the plane with contours and trajectories, and the values over the steps beside it."""
    function, goal = trajectories[0].function, approached_goal(trajectories)
    window = enclose(trajectories)
    minimum = float(function.evaluate(*torch.tensor(goal, dtype=torch.float64)))
    curves = [value_curve(item.values, minimum) for item in trajectories]
    traces = _contours(function, window, goal)
    for index, (item, curve) in enumerate(zip(trajectories, curves, strict=True)):
        ended = "" if item.diverged_at is None else f", diverged at step {item.diverged_at:,}"
        style = line(index, item.settings.label + ended, line_width(index, len(curves)))
        points = _thinned_path(item, window, goal)
        traces.append({**points, **style})
        last = {"mode": "markers", "showlegend": False, "marker": {"color": style["line"]["color"], "size": 8}}
        traces.append({**points, **style, **last, "meta": "last"})
        traces.append({**curve, **style, **_VALUE_AXES})
    traces += _marks(trajectories)
    noise = f"; gradient noise {function.noise:g}" if function.noise else ""
    layout = _layout(window, curves, trajectories[0].steps, known=bool(function.optima))
    frames = sorted(set(frame_steps(trajectories[0].steps)))
    return PagePanel(function.title, f"{function.formula}{noise}", traces, layout, frames)


def keep_corners(points: Array, fineness: Array) -> npt.NDArray[np.intp]:
    """Return the indices of the points, `(n, 2)`, to keep, the first and the last included.

    Each dropped point is nearer than its `fineness`, `(n, 2)`, to the kept point before it: no larger corner is lost.
    """
    kept = [0]
    places, limits = points.tolist(), fineness.tolist()
    x, y = places[0]
    for index, ((next_x, next_y), (limit_x, limit_y)) in enumerate(zip(places, limits, strict=True)):
        if abs(next_x - x) >= limit_x or abs(next_y - y) >= limit_y:
            kept.append(index)
            x, y = next_x, next_y
    return np.unique([*kept, len(places) - 1])


def _thinned_path(trajectory: Trajectory, window: Window, goal: Point) -> dict[str, Any]:
    """Return the points of a trajectory with step and value, thinned, but fine enough to zoom in on the goal."""
    zoom = window.around(goal)
    near = ((trajectory.points >= zoom.low) & (trajectory.points <= zoom.high)).all(axis=1, keepdims=True)
    sides = np.where(near, zoom.high - zoom.low, window.high - window.low)
    kept = keep_corners(trajectory.points, _FINENESS * sides)
    x, y = trajectory.points[kept].T
    values = short(trajectory.values[kept])
    return {
        "x": short(x),
        "y": short(y),
        "customdata": [[step, value] for step, value in zip(kept.tolist(), values, strict=True)],
        "hovertemplate": "step %{customdata[0]:,d}<br>x %{x:.5g}, y %{y:.5g}<br>value %{customdata[1]:.5g}",
    }


def _contours(function: TestFunction, window: Window, goal: Point) -> list[dict[str, Any]]:
    relief = relief_in(function, window, goal)
    if relief is None:
        return []
    # Every second point of each axis: a quarter of the size, and still fine enough for a screen.
    x, y, heights = relief[0][::2], relief[1][::2], np.log10(relief[2][::2, ::2])
    lowest, highest = float(np.nanmin(heights)), float(np.nanmax(heights))
    return [
        {
            "type": "contour",
            "x": short(x),
            "y": short(y),
            "z": [[None if math.isnan(z) else z for z in row] for row in heights.round(3).tolist()],
            "contours": {"start": lowest, "end": highest, "size": (highest - lowest) / (LEVELS - 1)},
            "autocontour": False,
            "colorscale": [[index / 3, colour] for index, colour in enumerate(CONTOUR_COLOURS)],
            "line": {"color": "white", "width": 0.4},
            "showscale": False,
            "hoverinfo": "skip",
        }
    ]


def _marks(trajectories: Sequence[Trajectory]) -> list[dict[str, Any]]:
    known = bool(trajectories[0].function.optima)
    ends = goals(trajectories)
    places = {
        "start": ([trajectories[0].points[0].tolist()], "circle", START_COLOUR),
        "optimum" if known else "lowest point found": (ends, "x" if known else "star", OPTIMUM_COLOUR),
    }
    return [
        {
            "x": [point[0] for point in points],
            "y": [point[1] for point in points],
            "mode": "markers",
            "name": name,
            "marker": {"symbol": symbol, "color": colour, "size": 12, "line": {"color": "white", "width": 1}},
            "hovertemplate": "x %{x:.5g}, y %{y:.5g}",
        }
        for name, (points, symbol, colour) in places.items()
    ]


def _layout(window: Window, curves: Sequence[dict[str, Any]], steps: int, known: bool) -> dict[str, Any]:
    (left, below), (right, above) = window.low.tolist(), window.high.tolist()
    height = "above the optimum's" if known else "above the lowest found"
    return {
        "xaxis": {"domain": [0, 0.6], "range": [left, right], "title": {"text": "x"}, "zeroline": False},
        "yaxis": {"range": [below, above], "title": {"text": "y"}, "zeroline": False},
        "xaxis2": {
            "domain": [0.7, 1],
            "range": [0, steps],
            "title": {"text": "step"},
            "tickformat": ",d",
            "gridcolor": GRID_COLOUR,
        },
        "yaxis2": {**value_axis(f"value {height}", curves), "anchor": "x2"},
        "height": 560,
    }
