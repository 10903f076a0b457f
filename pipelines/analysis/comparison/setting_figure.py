"""The figure of what numbers in the settings did to the final loss."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pipelines.analysis.comparison.results import Comparison, Entry, SettingEffect
from pipelines.analysis.figure_style import as_they_are, line_style, plain_axes

_COLUMNS = 3
_LABEL_WIDTH = 28
"""Letters in a line of a legend: what is below a panel is no wider than the panel."""


def draw_setting_effects(comparison: Comparison) -> Figure | None:
    """A panel for each setting, a line for each group of contenders that differ in it alone; None without any."""
    settings = list(dict.fromkeys(effect.setting for effect in comparison.setting_effects))
    if not settings:
        return None
    columns = min(_COLUMNS, len(settings))
    rows = math.ceil(len(settings) / columns)
    figure = Figure(figsize=(max(2.5 * columns, 3.6), 2.8 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes, setting in zip(panels.flat, settings, strict=False):
        _draw_panel(axes, [effect for effect in comparison.setting_effects if effect.setting == setting])
    for axes in panels.flat[len(settings) :]:
        axes.remove()
    for axes in panels[:, 0]:
        axes.set_ylabel("final validation loss")
    return figure


def _draw_panel(axes: Axes, effects: Sequence[SettingEffect]) -> None:
    values = sorted({value for effect in effects for value in effect.values})
    handles = []
    for index, effect in enumerate(effects):
        style = line_style(index)
        _draw_effect(axes, [values.index(value) for value in effect.values], effect.entries, style)
        label = textwrap.fill(effect.label, _LABEL_WIDTH)
        handles.append(Line2D([], [], label=label, linewidth=1.1, **style))
    axes.set_xticks(range(len(values)), [f"{value:g}" for value in values])
    axes.set(xlabel=effects[0].setting, xlim=(-0.4, len(values) - 0.6))
    plain_axes(axes)
    place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.19), "borderaxespad": 0}
    as_they_are(axes.legend(handles=handles, fontsize=6.5, handlelength=2.6, **place))


def _draw_effect(axes: Axes, places: Sequence[int], entries: Sequence[Entry], style: dict[str, Any]) -> None:
    colour = style["color"]
    means = [(place, entry.final.mean) for place, entry in zip(places, entries, strict=True) if entry.final]
    if means:
        axes.plot(*zip(*means, strict=True), **style, linewidth=1.1)
    for place, entry in zip(places, entries, strict=True):
        losses = [run.final_loss for run in entry.runs if run.final_loss is not None]
        axes.plot([place] * len(losses), losses, "o", markersize=3, markerfacecolor="none", color=colour)
        if entry.final and entry.final.low is not None and entry.final.high is not None:
            axes.plot([place, place], [entry.final.low, entry.final.high], color=colour, linewidth=0.8)
        if entry.diverged:
            axes.plot(place, 0.985, "x", markersize=4, color=colour, transform=axes.get_xaxis_transform())
