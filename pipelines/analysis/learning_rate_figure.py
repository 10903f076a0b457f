"""Figure of the learning rates at which optimizers converge, diverge, or do neither."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pipelines.analysis.figure_style import check_figure_path, figure_style, legend_below, save_figure
from pipelines.analysis.learning_rates import RateGrid

_COLOURS = "viridis_r"  # dark is slow, light is fast
_CONVERGED: dict[str, Any] = {"marker": "s", "markersize": 9, "linestyle": "none"}
_NEVER: dict[str, Any] = {"marker": "o", "color": "#999999", "markersize": 5, "fillstyle": "none", "linestyle": "none"}
_DIVERGED: dict[str, Any] = {"marker": "x", "color": "#CC3311", "markersize": 5, "linestyle": "none"}
_BEST: dict[str, Any] = {
    "marker": "*",
    "color": "white",
    "markeredgecolor": "black",
    "markersize": 8,
    "linestyle": "none",
}


def check_rates_path(path: Path) -> None:
    """Raise `UsageError` unless `draw_rates` can write a file of this name."""
    check_figure_path(path, ", with --lr-grid")


def draw_rates(grids: Sequence[RateGrid], path: Path) -> None:
    """Draw a panel per problem with a row per optimizer; write the figure to `path` (.png, .pdf or .svg)."""
    columns = min(len(grids), 2)
    rows = math.ceil(len(grids) / columns)
    height = 1.1 + 0.3 * len(grids[0].scans)
    with figure_style():
        figure = Figure(figsize=(1.0 + 4.2 * columns, 0.5 + height * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes, grid in zip(panels, grids, strict=False):
            _draw_panel(axes, grid)
        for unused in panels[len(grids) :]:
            unused.remove()
        legend_below(figure, _legend_handles())
        save_figure(figure, path)


def _draw_panel(axes: Axes, grid: RateGrid) -> None:
    quickest = min((scan.best.steps_to_converge or 1 for scan in grid.scans if scan.best is not None), default=1)
    norm, colours = LogNorm(quickest, max(grid.steps, quickest + 1)), matplotlib.colormaps[_COLOURS]
    for row, scan in enumerate(grid.scans):
        for outcome in scan.outcomes:
            if outcome.steps_to_converge is not None:
                style = {**_CONVERGED, "color": colours(norm(max(outcome.steps_to_converge, 1)))}
            else:
                style = _NEVER if outcome.diverged_at is None else _DIVERGED
            axes.plot(outcome.lr, row, **style)
        if scan.best is not None:
            axes.plot(scan.best.lr, row, **_BEST)
    axes.set(xscale="log", xlabel="learning rate", ylim=(len(grid.scans) - 0.4, -0.6))
    axes.set_yticks(range(len(grid.scans)), [scan.label for scan in grid.scans])
    axes.set_title(f"{grid.title}, {grid.steps:,} steps", weight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    bar = axes.figure.colorbar(ScalarMappable(norm, colours), ax=axes, pad=0.01)
    bar.set_label("steps to converge")


def _legend_handles() -> list[Line2D]:
    converged = {**_CONVERGED, "markersize": 7, "color": matplotlib.colormaps[_COLOURS](0.4)}
    styles = {"converges": converged, "fewest steps": _BEST, "does not": _NEVER, "diverges": _DIVERGED}
    return [Line2D([], [], label=label, **style) for label, style in styles.items()]
