"""Figure and interactive page of losses on matrix problems."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pipelines.analysis.figure_style import (
    NEUTRAL_COLOUR,
    TARGET,
    check_figure_path,
    figure_style,
    legend_below,
    line_style,
    save_figure,
)
from pipelines.analysis.matrix_losses import SHARE, LossRun
from pipelines.analysis.viz_page import GRID_COLOUR, PagePanel, line, value_axis, value_curve, write_page
from pipelines.errors import UsageError

_TARGET_LABEL = f"{SHARE:g} of the first loss"
_LOWEST = 1e-16  # of the first loss; lower values are rounding errors


def check_losses_path(path: Path) -> None:
    """Raise `UsageError` unless `write_losses` can write a file of this name."""
    if path.suffix.lower() == ".gif":
        raise UsageError(f"{path}: losses cannot be animated; give --out FILE.png, .pdf, .svg or .html")
    if path.suffix.lower() != ".html":
        check_figure_path(path, ", .html")


def write_losses(panels: Sequence[Sequence[LossRun]], path: Path) -> None:
    """Write a panel per problem, with the same settings in the same order, as a figure or a page (.html)."""
    if path.suffix.lower() == ".html":
        write_page([_page_panel(runs) for runs in panels], path)
        return
    with figure_style():
        figure = Figure(figsize=(1.0 + 3.4 * len(panels), 3.4), layout="constrained")
        for axes, runs in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            _draw_panel(axes, runs)
        legend_below(figure, _legend_handles(panels[0]))
        save_figure(figure, path)


def _draw_panel(axes: Axes, runs: Sequence[LossRun]) -> None:
    for index, run in enumerate(runs):
        axes.plot(np.maximum(run.values, np.finfo(np.float64).tiny), **line_style(index), linewidth=1.3)
    first = float(runs[0].values[0])
    axes.axhline(SHARE * first, **TARGET)
    lowest = max(min(float(run.values.min()) for run in runs), _LOWEST * first)
    axes.set(yscale="log", xlim=(0, runs[0].steps), ylim=(lowest / 3, 10 * first), xlabel="step", ylabel="loss")
    axes.set_title(f"{runs[0].problem.title}\n{runs[0].problem.formula}", fontsize=8)
    axes.grid(color=GRID_COLOUR, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _legend_handles(runs: Sequence[LossRun]) -> list[Line2D]:
    lines = [Line2D([], [], label=run.settings.label, **line_style(index)) for index, run in enumerate(runs)]
    return [*lines, Line2D([], [], label=_TARGET_LABEL, **TARGET)]


def _page_panel(runs: Sequence[LossRun]) -> PagePanel:
    problem, steps = runs[0].problem, runs[0].steps
    curves = [value_curve(run.values, minimum=0.0) for run in runs]
    traces = [
        {**curve, **line(index, run.settings.label)}
        for index, (run, curve) in enumerate(zip(runs, curves, strict=True))
    ]
    traces.append(
        {
            "x": [0, steps],
            "y": [SHARE * float(runs[0].values[0])] * 2,
            "mode": "lines",
            "name": _TARGET_LABEL,
            "line": {"color": NEUTRAL_COLOUR, "dash": "dot", "width": 1},
            "hoverinfo": "skip",
        }
    )
    layout = {
        "xaxis": {"range": [0, steps], "title": {"text": "step"}, "gridcolor": GRID_COLOUR},
        "yaxis": value_axis("loss", curves),
        "height": 480,
    }
    return PagePanel(problem.title, problem.formula, traces, layout)
