"""Figure of trajectories over the contours of test functions."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from models.functions import Point, TestFunction
from pipelines.analysis.figure_style import (
    NEUTRAL_COLOUR,
    OPTIMUM_COLOUR,
    START_COLOUR,
    figure_style,
    legend_below,
    line_style,
    save_figure,
)
from pipelines.analysis.trajectories import Trajectory

Array = npt.NDArray[np.float64]

# Pale, for contrast with lines of any colour; dark is low.
CONTOUR_COLOURS = ("#6d95a8", "#a3bdc8", "#d0dde1", "#f7f6f1")
LEVELS = 26
_GRID = 300  # points of the contour grid along each axis
_INSET = 0.37  # side of the inset, as a fraction of the panel's
_ZOOM = 0.055  # half the side of the zoomed area, as a fraction of the window's
_FORMULA_WIDTH = 40  # characters per line of a formula above a panel
_CODE_WIDTH = 34  # the same for a user's expression
_MARK = 0.025  # half of a mark, as a fraction of the panel's side
_WIDEST, _NARROWEST = 3.6, 1.1  # of the trajectories' lines, in points
_DASHED = 1.8  # points: dashes do not grow for lines wider than this


def _marker(shape: str, colour: str, *, size: float, edge: str, zorder: int) -> dict[str, Any]:
    return {
        "marker": shape,
        "color": colour,
        "markersize": size,
        "markeredgecolor": edge,
        "linestyle": "none",
        "zorder": zorder,
    }


_START = _marker("o", START_COLOUR, size=6.5, edge="black", zorder=6)
_LAST = _marker("o", NEUTRAL_COLOUR, size=4.5, edge="white", zorder=4)
_DIVERGED = _marker("X", NEUTRAL_COLOUR, size=8, edge="black", zorder=7)
_OPTIMUM = _marker("X", OPTIMUM_COLOUR, size=6.5, edge="white", zorder=5)
_LOWEST = _marker("*", OPTIMUM_COLOUR, size=9, edge="white", zorder=5)


class Window(NamedTuple):
    """A rectangle of the plane."""

    low: Array  # (2,): the smallest x and y
    high: Array  # (2,): the largest x and y

    def part(self, low: Array, high: Array) -> Window:
        """Return the part between two points, given as fractions of the window's sides."""
        size = self.high - self.low
        return Window(self.low + low * size, self.low + high * size)

    def around(self, point: Point) -> Window:
        """Return the area around a point that the inset shows."""
        half = _ZOOM * (self.high - self.low)
        return Window(np.array(point) - half, np.array(point) + half)

    def corners(self) -> Array:
        """The four corners, `(4, 2)`."""
        return np.array(list(itertools.product(*np.transpose(self))))

    def count(self, points: Array) -> int:
        """Return how many of the points, `(n, 2)`, are inside."""
        return int(((points >= self.low) & (points <= self.high)).all(axis=1).sum())


class DrawnLine(NamedTuple):
    """A trajectory in a plane: its points, `(2, n)`, and its artists."""

    points: Array
    strokes: tuple[Line2D, Line2D]  # the white edge, and the line above it
    last: Line2D
    diverged: Line2D | None  # the mark where it leaves the window for the last time


class Plane(NamedTuple):
    """A panel or its inset, and the artists above the contours."""

    axes: Axes
    is_inset: bool
    lines: list[DrawnLine]
    marks: list[Line2D]


def draw_trajectories(panels: Sequence[Sequence[Trajectory]], path: Path) -> None:
    """Draw a panel per function with its trajectories; write the figure to `path` (.png, .pdf or .svg).

    All trajectories of a panel start at the same point, and every panel shows the same settings in the same order.
    Raises `UsageError` for another file type.
    """
    with figure_style():
        save_figure(compose(panels)[0], path)


def compose(panels: Sequence[Sequence[Trajectory]]) -> tuple[Figure, list[Plane]]:
    """Return the figure and its planes, each panel before its inset. Call and draw it inside `figure_style`."""
    columns = {1: 1, 2: 2, 4: 2}.get(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    width, height = (4.0, 4.4) if len(panels) == 1 else (2.7 * columns, 3.0 * rows + 0.3)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    planes = [plane for pair in zip(axes, panels, strict=False) for plane in _draw_panel(*pair)]
    for unused in axes[len(panels) :]:
        unused.remove()
    legend_below(figure, _legend_handles(panels))
    return figure, planes


def _draw_panel(axes: Axes, trajectories: Sequence[Trajectory]) -> list[Plane]:
    function = trajectories[0].function
    goal = approached_goal(trajectories)
    window, corner = place_inset(trajectories, goal)
    zoom = window.around(goal)
    inset = axes.inset_axes((corner[0], corner[1], _INSET, _INSET))
    planes = []
    for plane, shown in ((axes, window), (inset, zoom)):
        _draw_contours(plane, function, shown, goal)
        lines = _draw_lines(plane, trajectories, window)
        planes.append(Plane(plane, plane is inset, lines, _draw_marks(plane, trajectories)))
        plane.set(xlim=(shown.low[0], shown.high[0]), ylim=(shown.low[1], shown.high[1]))
    axes.locator_params(nbins=6, steps=[1, 2, 5, 10])
    inset.locator_params(nbins=4, steps=[1, 2, 5, 10])
    inset.tick_params(labelsize=5.5, length=1.5, pad=1)
    axes.indicate_inset_zoom(inset, edgecolor="black", alpha=0.6, linewidth=0.6)
    axes.set(xlabel="x", ylabel="y")
    _write_title(axes, function)
    return planes


def _write_title(axes: Axes, function: TestFunction) -> None:
    """Write the function's name, and below it the formula, wrapped to the panel's width."""
    # A user's own formula is code: wider characters, often without spaces.
    lines = _wrapped(function.formula) if function.optima else textwrap.wrap(function.formula, _CODE_WIDTH)
    if function.noise:
        lines.append(f"gradient noise {function.noise:g}")
    size = 8 * min(1.0, _FORMULA_WIDTH / max(map(len, lines)))
    axes.set_title("\n".join(lines), fontsize=size, pad=4)
    above = (0, 6 + 1.25 * size * len(lines))
    axes.annotate(
        function.title, (0.5, 1), above, "axes fraction", "offset points", ha="center", weight="bold", fontsize=9
    )


def _wrapped(formula: str) -> list[str]:
    """Wrap a formula, only outside of brackets."""
    depth, text = 0, ""
    for character in formula:
        depth += (character in "([") - (character in ")]")
        text += "\N{NO-BREAK SPACE}" if character == " " and depth else character
    lines = textwrap.wrap(text, _FORMULA_WIDTH, break_long_words=False)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]


def goals(trajectories: Sequence[Trajectory]) -> Sequence[Point]:
    """Return the optima, or the lowest point found if none is known."""
    function = trajectories[0].function
    if function.optima:
        return function.optima
    # Trajectories that diverged are not a goal unless all did.
    ended = [item for item in trajectories if item.diverged_at is None] or trajectories
    return [min(ended, key=lambda item: float(item.values.min())).lowest_point]


def approached_goal(trajectories: Sequence[Trajectory]) -> Point:
    """Return the goal nearest to the end of any trajectory."""
    ends = np.array([trajectory.final_point for trajectory in trajectories])
    return min(goals(trajectories), key=lambda goal: float(np.hypot(*(ends - np.array(goal)).T).min()))


def _landmarks(trajectories: Sequence[Trajectory]) -> Array:
    view = trajectories[0].function.view or ()
    return np.array([trajectories[0].points[0], *goals(trajectories), *view])


def enclose(trajectories: Sequence[Trajectory]) -> Window:
    """Return a window around start, optima and trajectories, except those that overshoot far or diverge."""
    landmarks = _landmarks(trajectories)
    low, high = landmarks.min(axis=0), landmarks.max(axis=0)
    span = np.maximum(high - low, max(float((high - low).max()) / 3, 1e-3))
    limit = Window(low - 2 * span, high + 2 * span)
    near = [item.points for item in trajectories if limit.count(item.points) == len(item.points)]
    shown = np.concatenate([landmarks, *near])
    low, high = shown.min(axis=0), shown.max(axis=0)
    margin = 0.1 * np.maximum(high - low, span)
    return Window(low - margin, high + margin)


def place_inset(trajectories: Sequence[Trajectory], goal: Point) -> tuple[Window, Array]:
    """Return the window and the inset's lower left corner, as fractions of the panel's sides, that hide the least."""
    lines = np.concatenate([_along(trajectory) for trajectory in trajectories])
    least_hidden = math.inf
    for window, corner in _layouts(enclose(trajectories)):
        # Includes the inset's tick labels. Hiding a mark is worse than hiding any length of line.
        cover = window.part(corner - 0.1, corner + _INSET + 0.05)
        marks = np.concatenate([_landmarks(trajectories), window.around(goal).corners()])
        hidden = cover.count(lines) + len(lines) * cover.count(marks)
        if hidden < least_hidden:
            best, least_hidden = (window, corner), hidden
    return best


def _layouts(tight: Window) -> Iterator[tuple[Window, Array]]:
    """Yield windows and inset corners to try, the tightest first: each corner, with increasing room added there."""
    for room in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5):
        for side in np.array([(1, 1), (0, 1), (1, 0), (0, 0)]):
            yield tight.part(-room * (1 - side), 1 + room * side), np.where(side, 0.965 - _INSET, (0.125, 0.085))


def _along(trajectory: Trajectory) -> Array:
    """Return points, `(n, 2)`, along the line through a trajectory's points, so long steps count too."""
    steps = np.arange(len(trajectory.points))
    dense = np.linspace(0, steps[-1], 10 * min(len(steps), 1000))
    return np.stack([np.interp(dense, steps, trajectory.points[:, axis]) for axis in (0, 1)], axis=1)


def _draw_contours(axes: Axes, function: TestFunction, window: Window, goal: Point) -> None:
    relief = relief_in(function, window, goal)
    if relief is None:
        return
    x, y, heights = relief
    lowest, highest = float(np.nanmin(heights)), float(np.nanmax(heights))
    heights = np.ma.masked_invalid(heights)
    levels = np.geomspace(lowest, highest, LEVELS)
    norm = LogNorm(lowest, highest)
    colours = LinearSegmentedColormap.from_list("contours", CONTOUR_COLOURS)
    axes.contourf(x, y, heights, levels=levels, norm=norm, cmap=colours, zorder=0)
    # No lines at the lowest levels: in a narrow valley the grid is too coarse, and they would look dotted.
    axes.contour(x, y, heights, levels=levels[3:], colors="white", linewidths=0.35, alpha=0.7, zorder=0)
    # Rasterize contours in vector files, where they would take megabytes.
    axes.set_rasterization_zorder(1)


def relief_in(function: TestFunction, window: Window, goal: Point) -> tuple[Array, Array, Array] | None:
    """Return x and y over the window, `(_GRID,)` each, and the heights above the minimum, `(_GRID, _GRID)`.

    Heights are clipped at both ends, so their logarithms are finite; NaN where the function is undefined. Returns
    `None` for a function that is flat in the window, or finite nowhere. If the minimum is unknown, the lowest value of
    the goal and the grid takes its place.
    """
    x, y = (torch.linspace(window.low[axis], window.high[axis], _GRID, dtype=torch.float64) for axis in (0, 1))
    minimum = function.evaluate(*torch.tensor(goal, dtype=torch.float64))
    values = function.evaluate(*torch.meshgrid(x, y, indexing="xy"))
    if not function.optima:
        minimum = torch.cat([values[values.isfinite()], minimum[None]]).min()
    heights = (values - minimum).numpy()
    highest = float(heights.max(initial=0.0, where=np.isfinite(heights)))
    if highest == 0:
        return None
    lowest = max(float(np.quantile(heights[np.isfinite(heights)], 0.005)), highest * 1e-12)
    return x.numpy(), y.numpy(), np.clip(heights, lowest, highest)


def _draw_lines(axes: Axes, trajectories: Sequence[Trajectory], window: Window) -> list[DrawnLine]:
    # matplotlib cannot draw the huge points of a divergence: clip them, still far outside of the window.
    reach = window.part(np.array(-1000.0), np.array(1000.0))
    lines = []
    for index, trajectory in enumerate(trajectories):
        style = _line_style(index, len(trajectories))
        points = np.clip(trajectory.points, reach.low, reach.high).T
        (edge,) = axes.plot(*points, color="white", linewidth=style["linewidth"] + 1.2, zorder=2)
        (line,) = axes.plot(*points, **style, zorder=3)
        (last,) = axes.plot(*points[:, -1:], **_LAST | {"color": style["color"]})
        has_diverged = trajectory.diverged_at is not None
        diverged = _mark_divergence(axes, trajectory, window, style["color"]) if has_diverged else None
        lines.append(DrawnLine(points, (edge, line), last, diverged))
    return lines


def _mark_divergence(axes: Axes, trajectory: Trajectory, window: Window, colour: str) -> Line2D:
    inner = window.part(np.array(_MARK), np.array(1 - _MARK))  # not on the edge: the mark would cover the title
    (mark,) = axes.plot(*np.clip(leaves_at(trajectory.points, window), *inner), **_DIVERGED | {"color": colour})
    return mark


def leaves_at(points: Array, window: Window) -> Array:
    """Return the point, `(2,)`, where the path `points`, `(n, 2)`, last leaves the window; its end if it does not."""
    inside = np.flatnonzero(((points >= window.low) & (points <= window.high)).all(axis=1))
    last = int(inside[-1]) if len(inside) else 0
    begin = points[last]
    step = np.clip(points[min(last + 1, len(points) - 1)], -1e300, 1e300) - begin
    edges = np.where(step > 0, window.high, window.low)
    moves = step != 0
    fraction = min([1.0, *((edges - begin)[moves] / step[moves])])  # of the step, up to the nearest edge
    return np.asarray(np.clip(begin + fraction * step, window.low, window.high))


def _draw_marks(axes: Axes, trajectories: Sequence[Trajectory]) -> list[Line2D]:
    style = _OPTIMUM if trajectories[0].function.optima else _LOWEST
    drawn = axes.plot(*np.transpose(goals(trajectories)), **style)
    return drawn + axes.plot(*trajectories[0].points[0], **_START)


def line_width(index: int, count: int) -> float:
    """Return the width in points. Later lines are drawn on top and thinner, so both are visible where they overlap."""
    return float(np.linspace(_WIDEST, _NARROWEST, count)[index]) if count > 1 else 1.8


def _line_style(index: int, count: int) -> dict[str, Any]:
    width = line_width(index, count)
    style = line_style(index) | {"linewidth": width}
    if style["linestyle"] != "-":  # limit the dashes of thick lines: the legend's handles are short
        style["linestyle"] = (0, tuple(length * min(1.0, _DASHED / width) for length in style["linestyle"][1]))
    return style


def _legend_handles(panels: Sequence[Sequence[Trajectory]]) -> list[Line2D]:
    settings = [item.settings for item in panels[0]]
    lines = [
        Line2D([], [], label=setting.label, **_line_style(index, len(settings)))
        for index, setting in enumerate(settings)
    ]
    marks = {"start": _START, "last point": _LAST}
    if any(item.diverged_at is not None for panel in panels for item in panel):
        marks["diverged"] = _DIVERGED
    known = [bool(panel[0].function.optima) for panel in panels]
    if any(known):
        marks["optimum"] = _OPTIMUM
    if not all(known):
        marks["lowest point found"] = _LOWEST
    return [*lines, *(Line2D([], [], label=label, **style) for label, style in marks.items())]
