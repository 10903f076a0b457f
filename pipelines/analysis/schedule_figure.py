"""Figure of a run's schedule: the learning rate and the other scheduled values over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pipelines.analysis.figure_style import check_figure_path as check_figure_path
from pipelines.analysis.figure_style import figure_style, legend_below, line_style, plain_axes, save_figure
from pipelines.training.schedule import ScheduledValue

_TITLES = {"lr": "learning rate", "momentum": "momentum", "beta2": "beta2", "weight_decay": "weight decay"}
_MOST_POINTS = 10_000
"""More than a figure has pixels."""


def draw_schedule(values: Sequence[ScheduledValue], path: Path) -> None:
    """Draw a panel for each kind of value, with a line for each part of the model (.png, .pdf or .svg)."""
    lines = _lines(values)
    panels = [name for name in _TITLES if any(value.name == name for value in lines.values())]
    labels = list(dict.fromkeys(label for label, _ in lines))
    styles = {label: line_style(index) for index, label in enumerate(labels)}
    with figure_style():
        figure = Figure(figsize=(6.0, 0.7 + 1.7 * len(panels)), layout="constrained")
        column = dict(zip(panels, figure.subplots(len(panels), squeeze=False, sharex=True).flatten(), strict=True))
        for (label, name), value in lines.items():
            _draw(column[name], value, styles[label])
        for name, axes in column.items():
            axes.set_ylabel(_TITLES[name])
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]) if name in ("lr", "weight_decay") else None)
            plain_axes(axes)
        axes.set_xlabel("step")
        if len(labels) > 1:
            legend_below(figure, [Line2D([], [], label=label, linewidth=1.5, **styles[label]) for label in labels])
        save_figure(figure, path)


def _lines(values: Sequence[ScheduledValue]) -> dict[tuple[str, str], ScheduledValue]:
    """Return the different values, by label and name. A weight decay of 0, which stays 0, is left out beside others."""
    different = {(value.name, value.part, value.base): value for value in values}
    bases = {name: [value.base for value in different.values() if value.name == name] for name in _TITLES}
    shown = [value for value in different.values() if value.base or not any(bases[value.name])]
    is_split = any(value.part for value in values)
    lines = {}
    for value in shown:
        label = value.part or ("other parameters" if is_split else "all parameters")
        if len({other.base for other in shown if (other.name, other.part) == (value.name, value.part)}) > 1:
            label = f"{value.part or 'parameters'} with {_TITLES[value.name]} {value.base:g}"
        lines[label, value.name] = value
    return lines


def _draw(axes: Axes, value: ScheduledValue, style: dict[str, Any]) -> None:
    last = value.total_steps - 1
    steps = np.unique(np.linspace(0, last, min(value.total_steps, _MOST_POINTS)).round().astype(int))
    axes.plot(steps, [value.at(int(step)) for step in steps], linewidth=1.2, marker="" if last else ".", **style)
