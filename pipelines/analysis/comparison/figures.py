"""The figures of a comparison, for papers and talks."""

from __future__ import annotations

import math
import re
import statistics
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, PercentFormatter

from pipelines.analysis.comparison.difference_figure import draw_differences
from pipelines.analysis.comparison.layer_tables import measured_tables
from pipelines.analysis.comparison.results import Array, Band, Comparison, Curve, Entry, Sensitivity, SettingEffect
from pipelines.analysis.comparison.tables import Table, digits
from pipelines.analysis.comparison.thinning import without_outliers
from pipelines.analysis.comparison.tuning_figure import draw_tuning
from pipelines.analysis.figure_style import (
    MOST_STYLES,
    NEUTRAL_COLOUR,
    TARGET,
    band_handle,
    disable_math,
    figure_style,
    legend_below,
    line_style,
    plain_axes,
    row_labels,
    save_figure,
)
from pipelines.analysis.layer_figures import write_layer_figures
from pipelines.analysis.shadow_figures import write_shadow_figures
from pipelines.tasks.metric import Metric
from pipelines.training.shadow_file import SHADOWS
from pipelines.training.statistics_file import STATISTICS

Abscissa = Literal["steps", "tokens", "seconds"]

MOST_SHOWN = MOST_STYLES
"""Contenders in a figure: more lines could not be distinguished."""

_BEGINNING = 0.2  # of the run: the metric changes so much there that it would hide everything else

_PANELS_IN_A_ROW = 3
_LABEL_WIDTH = 28
"""Characters in a legend line, so the legend below a panel is no wider than the panel."""

LAYERS_FOLDER = "layers"
"""Subfolder of the figures' folder."""

MOST_WITH_LAYERS = 6
"""Contenders with layer figures; each has up to four."""

_LAYER_WORDS = {
    "layer-updates": "How far an update moves the weights, as a share of their norm",
    "layer-norms": "Norms of the gradients and of the updates",
    "layer-scales": "How the scales of the steps are distributed",
    "layer-preconditioners": "Condition numbers of the preconditioners",
    "shadow-steps": "What other optimizers would have done: angle to the run's step, and length",
    "shadow-losses": "The loss after steps in their directions",
    "shadow-spectra": "Singular values of their steps, by kind of weight matrix",
}


def shown(comparison: Comparison) -> tuple[Entry, ...]:
    """Return the contenders that fit into figures, the best first."""
    return comparison.contenders[:MOST_SHOWN]


def write_figures(comparison: Comparison, folder: Path) -> tuple[str, ...]:
    """Write all figures that have data, as PNG and PDF; return their names, in the order of `figure_names`."""
    names = []
    with figure_style():
        for name, draw in _drawers(comparison.metric).items():
            figure = draw(comparison)
            if figure is not None:
                save_figure(figure, folder / f"{name}.png")
                save_figure(figure, folder / f"{name}.pdf")
                names.append(name)
    return tuple(names)


def axis_title(abscissa: Abscissa, unit: str) -> str:
    """Return the axis label."""
    return {"steps": "step", "tokens": unit, "seconds": "seconds of training, without validation"}[abscissa]


def _draw_curves(comparison: Comparison, abscissa: Abscissa) -> Figure | None:
    entries = [(line_style(index), entry) for index, entry in enumerate(shown(comparison)) if has(entry, abscissa)]
    metric = comparison.metric
    drawn = [(style, entry) for style, entry in entries if entry.train or entry.val or entry.diverged]
    if not drawn:
        return None
    figure = Figure(figsize=(7.0, 3.4), layout="constrained")
    training, validation = figure.subplots(1, 2)
    for style, entry in drawn:
        _draw_band(training, entry.train, abscissa, style)
        _draw_band(validation, entry.val, abscissa, style)
        for run in entry.runs:
            if run.state == "diverged":
                _draw_curve(training, run.train.since(run.drawn_from), abscissa, style)
                _draw_curve(validation, run.val.since(run.drawn_from), abscissa, style)
    training.set(title="Training, smoothed", ylabel=metric.name)
    validation.set(title="Validation")
    for axes, bands in ((training, [e.train for _, e in drawn]), (validation, [e.val for _, e in drawn])):
        axes.set_xlabel(axis_title(abscissa, comparison.unit))
        axes.locator_params(axis="x", nbins=6)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: digits(value)))
        _leave_out_beginning(axes, [(getattr(band, abscissa), band.mean) for band in bands if band is not None], metric)
        plain_axes(axes)
        _label_shares(axes.yaxis, metric)
    if comparison.target is not None:
        validation.axhline(comparison.target.value, **TARGET)
    legend_below(figure, [*_handles(drawn), *_target_handle(comparison)])
    return figure


def has(entry: Entry, abscissa: Abscissa) -> bool:
    """Return whether the curves of an entry have it: logs of other programs often lack tokens and seconds."""
    curves = [curve for run in entry.runs for curve in (run.train, run.val) if len(curve.steps)]
    return not curves or any(np.isfinite(getattr(curve, abscissa)).any() for curve in curves)


def _draw_band(axes: Axes, band: Band | None, abscissa: Abscissa, style: dict[str, Any]) -> None:
    if band is not None and len(band.steps):
        x = getattr(band, abscissa)
        axes.fill_between(x, band.lowest, band.highest, color=style["color"], alpha=0.18, linewidth=0)
        axes.plot(x, band.mean, **style, linewidth=1.1)


def _label_shares(axis: Axis, metric: Metric) -> None:
    """Label the ticks as percentages, if the metric is a fraction."""
    if metric.is_share:
        axis.set_major_formatter(PercentFormatter(1.0))


def _draw_curve(axes: Axes, curve: Curve, abscissa: Abscissa, style: dict[str, Any]) -> None:
    axes.plot(getattr(curve, abscissa), curve.values, **style, linewidth=0.5, alpha=0.5)


def _leave_out_beginning(axes: Axes, curves: Sequence[tuple[Array, Array]], metric: Metric) -> None:
    last = max((float(x[-1]) for x, _ in curves if len(x) and np.isfinite(x[-1])), default=0.0)
    late = [metric.sign * values[(x >= _BEGINNING * last) & np.isfinite(values)] for x, values in curves]
    late = [costs for costs in late if len(costs)]
    if last > 0 and late:
        low = min(float(costs.min()) for costs in late)
        high = without_outliers(low, [float(costs.max()) for costs in late])
        margin = 0.06 * max(high - low, 1e-3)
        axes.set(xlim=(0, last * 1.02), ylim=_range(low - margin, high + margin, metric))


def _range(low: float, high: float, metric: Metric) -> tuple[float, float]:
    """Return the range of values with costs between `low` and `high`, ascending."""
    return metric.either((low, high), (-high, -low))


def _draw_finals(comparison: Comparison) -> Figure | None:
    metric = comparison.metric
    entries = [entry for entry in shown(comparison) if entry.final is not None]
    if not entries:
        return None
    labels, height = row_labels([entry.label for entry in entries])
    figure = Figure(figsize=(7.0, 0.9 + height), layout="constrained")
    axes = figure.subplots()
    costs = [metric.sign * entry.final.mean for entry in entries if entry.final]
    edge = without_outliers(costs[0], costs)
    for row, entry in enumerate(entries):
        _draw_final(axes, row, entry, edge, metric)
    if comparison.target is not None:
        axes.axvline(comparison.target.value, **TARGET, zorder=0)
    axes.set_yticks(range(len(entries)), labels)
    axes.set(xlabel=f"final validation {metric.name}", ylim=(len(entries) - 0.4, -0.6))
    axes.margins(x=0.04)
    plain_axes(axes)
    _label_shares(axes.xaxis, metric)
    interval = f"mean, {comparison.confidence:.0%} interval"
    mean = Line2D([], [], color=NEUTRAL_COLOUR, marker="|", markersize=11, label=interval)
    seed = _mark("o", "a seed", markerfacecolor="none")
    legend_below(figure, [mean, seed, *_target_handle(comparison)])
    return figure


def _draw_final(axes: Axes, row: int, entry: Entry, edge: float, metric: Metric) -> None:
    assert entry.final is not None
    final, colour = entry.final, line_style(row)["color"]
    if metric.sign * final.mean > edge:
        x, marker, shift, side = metric.either((0.99, ">", -6, "right"), (0.01, "<", 6, "left"))
        text = {"textcoords": "offset points", "xytext": (shift, 0), "va": "center", "ha": side, "fontsize": 7}
        place = axes.get_yaxis_transform()
        axes.plot(x, row, marker=marker, markersize=4.5, color=colour, transform=place)
        axes.annotate(metric.text(final.mean), (x, row), xycoords=place, **text)  # type: ignore[arg-type]
        return
    if final.low is not None and final.high is not None:
        axes.plot([final.low, final.high], [row, row], color=colour, linewidth=1.4)
    seeds = [run.final for run in entry.runs if run.state == "finished" and run.final is not None]
    axes.plot(seeds, [row] * len(seeds), linestyle="", marker="o", markersize=3.5, markerfacecolor="none", color=colour)
    axes.plot(final.mean, row, marker="|", markersize=11, markeredgewidth=1.6, color=colour)


def _draw_sensitivity(comparison: Comparison) -> Figure | None:
    metric, families = comparison.metric, comparison.sensitivities[:MOST_SHOWN]
    if not families:
        return None
    figure = Figure(figsize=(7.0, 3.4), layout="constrained")
    axes = figure.subplots()
    styles = _family_styles(comparison, families)
    for row, (style, family) in enumerate(zip(styles, families, strict=True)):
        _draw_family(axes, family, style, row, metric)
    points = [point for family in families for point in family.points]
    costs = [metric.sign * value for point in points for value in (*point.values, *point.unfinished)]
    if costs:
        low, high = min(costs), without_outliers(min(costs), costs)
        margin = 0.06 * max(high - low, 1e-3)
        axes.set_ylim(_range(low - margin, high + 2 * margin, metric))
    pairs = zip(families, styles, strict=True)
    beyond = [_mark_beyond(axes, family, style["color"], metric) for family, style in pairs]
    axes.set(xscale="log", xlabel="learning rate", ylabel=f"final validation {metric.name}")
    plain_axes(axes)
    _label_shares(axes.yaxis, metric)
    handles = [Line2D([], [], label=each.family, **style) for each, style in zip(families, styles, strict=True)]
    if any(point.unfinished for point in points):
        handles.append(_mark("o", f"stopped early, best {metric.name}", markerfacecolor="none"))
    if any(point.diverged for point in points):
        handles.append(_mark("x", "diverged"))
    if any(beyond):
        handles.append(_mark(metric.either("^", "v"), "beyond the axis"))
    legend_below(figure, handles)
    return figure


def _mark_beyond(axes: Axes, family: Sensitivity, colour: str, metric: Metric) -> bool:
    """Mark the rates that have a value beyond the axis, on its edge; return whether there are any."""
    edge = metric.either(*reversed(axes.get_ylim()))
    beyond = [
        point.lr
        for point in family.points
        if any(metric.sign * (value - edge) > 0 for value in (*point.values, *point.unfinished))
    ]
    look: dict[str, Any] = {"linestyle": "", "marker": metric.either("^", "v"), "markersize": 4.5}
    if beyond:
        axes.plot(beyond, [edge] * len(beyond), color=colour, clip_on=False, zorder=3, **look)
    return bool(beyond)


def _family_styles(comparison: Comparison, families: Sequence[Sensitivity]) -> list[dict[str, Any]]:
    """Return the line styles: a family has its contender's style in all figures; others have their own."""
    known = [entry.family for entry in comparison.contenders]
    known += [family.family for family in families if family.family not in known]
    return [line_style(known.index(family.family)) for family in families]


def _draw_family(axes: Axes, family: Sensitivity, style: dict[str, Any], row: int, metric: Metric) -> None:
    colour = style["color"]
    means = [(point.lr, statistics.fmean(point.values)) for point in family.points if point.values]
    if means:
        axes.plot(*zip(*means, strict=True), **style, linewidth=1.1)
    for point in family.points:
        axes.plot([point.lr] * len(point.values), point.values, "o", markersize=3, color=colour)
        stopped = [point.lr] * len(point.unfinished)
        axes.plot(stopped, point.unfinished, "o", markersize=4, markerfacecolor="none", color=colour)
        if point.diverged:
            height = 0.985 - 0.028 * (row % 8)  # fraction of the axes: one row per family
            _draw_cross(axes, point.lr, height, colour, metric)


def _draw_cross(axes: Axes, x: float, height: float, colour: str, metric: Metric) -> None:
    """Mark a diverged run where values are bad; `height` is the fraction of the axes if low values are good."""
    place = axes.get_xaxis_transform()
    axes.plot(x, metric.either(height, 1 - height), "x", markersize=4, color=colour, transform=place)


def _draw_cost(comparison: Comparison) -> Figure | None:
    entries = [entry for entry in shown(comparison) if entry.step_ms and entry.optimizer_ms is not None]
    if not entries:
        return None
    states = [entry.state_bytes or 0 for entry in entries]
    labels, height = row_labels([entry.label for entry in entries])
    figure = Figure(figsize=(7.0, 0.9 + height), layout="constrained")
    panels = figure.subplots(1, 2 if any(states) else 1, sharey=True, squeeze=False)[0]
    rows, times = np.arange(len(entries)), panels[0]
    steps = np.array([entry.step_ms or 0.0 for entry in entries])
    parts = np.array([entry.optimizer_ms or 0.0 for entry in entries])
    times.barh(rows, parts, height=0.62, color="#0077BB", label="optimizer")
    times.barh(rows, np.maximum(steps - parts, 0), left=parts, height=0.62, color="#cfd8dc", label="the rest of a step")
    times.set_yticks(rows, labels)
    times.set(xlabel="milliseconds a step, median", ylim=(len(entries) - 0.4, -0.6))
    if any(states):
        panels[1].barh(rows, np.array(states) / 1e6, height=0.62, color="#997700")
        panels[1].set_xlabel("optimizer state, MB")
    for axes in panels:
        plain_axes(axes)
        axes.grid(visible=False, axis="y")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _handles(drawn: Sequence[tuple[dict[str, Any], Entry]]) -> list[Line2D]:
    handles = [Line2D([], [], label=entry.label, linewidth=1.5, **style) for style, entry in drawn]
    if any(len(entry.runs) > 1 for _, entry in drawn):
        handles.append(band_handle("lowest to highest seed"))
    return handles


def _target_handle(comparison: Comparison) -> list[Line2D]:
    """Return the legend's handle for the target, if there is a target."""
    target = comparison.target
    return [] if target is None else [Line2D([], [], label=f"target, {comparison.metric.text(target.value)}", **TARGET)]


def _mark(marker: str, label: str, **more: Any) -> Line2D:
    return Line2D([], [], color=NEUTRAL_COLOUR, marker=marker, markersize=4, linestyle="", label=label, **more)


def draw_setting_effects(comparison: Comparison) -> Figure | None:
    """Draw a panel per setting with a line per group of contenders that differ only in it; None without settings."""
    settings = list(dict.fromkeys(effect.setting for effect in comparison.setting_effects))
    if not settings:
        return None
    columns = min(_PANELS_IN_A_ROW, len(settings))
    rows = math.ceil(len(settings) / columns)
    figure = Figure(figsize=(max(2.5 * columns, 3.6), 2.8 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes, setting in zip(panels.flat, settings, strict=False):
        effects = [effect for effect in comparison.setting_effects if effect.setting == setting]
        _draw_panel(axes, effects, comparison.metric)
    for axes in panels.flat[len(settings) :]:
        axes.remove()
    for axes in panels[:, 0]:
        axes.set_ylabel(f"final validation {comparison.metric.name}")
    return figure


def _draw_panel(axes: Axes, effects: Sequence[SettingEffect], metric: Metric) -> None:
    values = sorted({value for effect in effects for value in effect.values})
    handles = []
    for index, effect in enumerate(effects):
        style = line_style(index)
        _draw_effect(axes, [values.index(value) for value in effect.values], effect.entries, style, metric)
        label = textwrap.fill(effect.label, _LABEL_WIDTH)
        handles.append(Line2D([], [], label=label, linewidth=1.1, **style))
    axes.set_xticks(range(len(values)), [f"{value:g}" for value in values])
    axes.set(xlabel=effects[0].setting, xlim=(-0.4, len(values) - 0.6))
    plain_axes(axes)
    _label_shares(axes.yaxis, metric)
    place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.19), "borderaxespad": 0}
    disable_math(axes.legend(handles=handles, fontsize=6.5, handlelength=2.6, **place))


def _draw_effect(
    axes: Axes, places: Sequence[int], entries: Sequence[Entry], style: dict[str, Any], metric: Metric
) -> None:
    colour = style["color"]
    means = [(place, entry.final.mean) for place, entry in zip(places, entries, strict=True) if entry.final]
    if means:
        axes.plot(*zip(*means, strict=True), **style, linewidth=1.1)
    for place, entry in zip(places, entries, strict=True):
        seeds = [run.final for run in entry.runs if run.final is not None]
        axes.plot([place] * len(seeds), seeds, "o", markersize=3, markerfacecolor="none", color=colour)
        if entry.final and entry.final.low is not None and entry.final.high is not None:
            axes.plot([place, place], [entry.final.low, entry.final.high], color=colour, linewidth=0.8)
        if entry.diverged:
            _draw_cross(axes, place, 0.985, colour, metric)


def _drawers(metric: Metric) -> dict[str, Callable[[Comparison], Figure | None]]:
    """Return the figures' functions by file name."""
    return {
        f"{metric.name}-steps": partial(_draw_curves, abscissa="steps"),
        f"{metric.name}-tokens": partial(_draw_curves, abscissa="tokens"),
        f"{metric.name}-seconds": partial(_draw_curves, abscissa="seconds"),
        f"final-{metric.plural}": _draw_finals,
        "differences": draw_differences,
        "sensitivity": _draw_sensitivity,
        "settings": draw_setting_effects,
        "tuning-budget": draw_tuning,
        "optimizer-cost": _draw_cost,
    }


def figure_names(metric: Metric) -> tuple[str, ...]:
    """Return the names of all possible figures."""
    return tuple(_drawers(metric))


@dataclass(frozen=True)
class LayerFigures:
    """The figures of one run, and their tables."""

    run: str
    images: tuple[tuple[str, bytes], ...]
    """Description and PNG file of each figure."""
    tables: tuple[Table, ...]


def write_layers(contenders: Sequence[Entry], figures: Path) -> list[LayerFigures]:
    """Draw what each contender measured, in the run with most: layer statistics, and shadow optimizers.

    Writes PNG and PDF files into `figures/layers/RUN-NAME`, and the values that they show as CSV. Raises `AsgoError`
    for an unreadable file.
    """
    runs = [max(entry.runs, key=lambda run: len(_measurements(run.path))) for entry in contenders if entry.runs]
    drawn = []
    for run in [run for run in runs if _measurements(run.path)][:MOST_WITH_LAYERS]:
        folder = figures / LAYERS_FOLDER / re.sub(r"[^A-Za-z0-9._-]+", "-", run.name)
        paths = [path for write in _measurements(run.path) for path in write(run.path, folder)]
        images = [(_LAYER_WORDS[path.stem], path.read_bytes()) for path in paths if path.suffix == ".png"]
        tables = measured_tables(run.path)
        for table in tables:
            table.write(folder)
        drawn.append(LayerFigures(run.name, tuple(images), tuple(tables)))
    return drawn


def _measurements(run: Path) -> list[Callable[[Path, Path], list[Path]]]:
    """Return the functions that draw what a run has measured."""
    kinds = ((STATISTICS, write_layer_figures), (SHADOWS, write_shadow_figures))
    return [write for name, write in kinds if _has_records(run / name)]


def _has_records(path: Path) -> bool:
    """Return whether a record follows the header line."""
    try:
        with path.open("rb") as file:
            return sum(line.endswith(b"\n") for line, _ in zip(file, range(2), strict=False)) == 2
    except OSError:
        return False
