"""Figures of a run's layer statistics: update, gradient, scales and preconditioners of each layer.

A line is a kind of weight matrix, such as the queries of all blocks: the median over the blocks, in a band from minimum
to maximum. Heat maps show all parameters.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from pipelines.analysis.figure_style import figure_style, legend_below, line_style, plain_axes, save_figures
from pipelines.errors import UsageError
from pipelines.training.statistics_file import STATISTICS, Layer, Statistics, read_statistics

Array = npt.NDArray[np.float64]
Value = Callable[[Layer], float | None]
"""One statistic of a layer; None if it has none."""

_SINGULAR = 2.0**23
"""The largest condition number that float32 can distinguish from infinity."""
_SMALLEST_SHARE = 1e-5  # lower end of the colour scale
_ROW = 0.02  # minimum distance of two labels of a heat map, as a fraction of its height


def draw_layers(run: Path) -> list[tuple[str, Figure]]:
    """Return the figures of a run's layer statistics, each with a file name; save them inside `figure_style`.

    Raises `UsageError` for a run without layer statistics.
    """
    statistics = read_statistics(run / STATISTICS)
    if statistics is None or not statistics.records:
        raise UsageError(f"{run}: has no layer statistics; train with --set statistics.every=100")
    with figure_style():
        figures = [("layer-updates", _draw_updates(statistics)), ("layer-norms", _draw_norms(statistics))]
        if statistics.header["scale_edges"] is not None:
            figures.append(("layer-scales", _draw_scales(statistics, np.array(statistics.header["scale_edges"]))))
        if factors := _factors(statistics):
            figures.append(("layer-preconditioners", _draw_preconditioners(statistics, factors)))
    return figures


def write_layer_figures(run: Path, out: Path) -> list[Path]:
    """Draw a run's layer statistics into the folder `out`, each figure as PNG and PDF; return the files."""
    return save_figures(draw_layers(run), out)


def kinds_of(shapes: Mapping[str, Sequence[int]]) -> dict[str, list[str]]:
    """Return the names of the weight matrices by kind: the last two parts of a name, without `weight` and indices."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for name, shape in shapes.items():
        if len(shape) > 1:
            words = [word for word in name.removesuffix(".weight").split(".") if not word.isdigit()]
            kinds[".".join(words[-2:])].append(name)
    return dict(kinds)


def values_of(statistics: Statistics, names: Iterable[str], value: Value) -> Array:
    """Return one statistic of layers over the records, shape (records, names); NaN where it is missing."""
    nothing: Layer = {}
    rows = [[value(record["layers"].get(name, nothing)) for name in names] for record in statistics.records]
    return np.array(rows, dtype=np.float64)


def _draw_updates(statistics: Statistics) -> Figure:
    figure = Figure(figsize=(7.0, 4.4), layout="constrained")
    lines, heat_map = figure.subplots(1, 2)
    handles = _draw_kinds(lines, statistics, lambda layer: layer.get("update_to_weight"))
    lines.set(title="Weight matrices", ylabel="update norm / weight norm")
    _scale_by_logarithms(lines)
    mesh = _draw_heat_map(heat_map, statistics, lambda layer: layer.get("update_to_weight"))
    heat_map.set_title("All parameters")
    figure.colorbar(mesh, ax=heat_map, label="update norm / weight norm")
    legend_below(figure, handles)
    return figure


def _draw_norms(statistics: Statistics) -> Figure:
    figure = Figure(figsize=(7.0, 3.4), layout="constrained")
    gradients, updates = figure.subplots(1, 2)
    _draw_kinds(gradients, statistics, lambda layer: layer.get("grad_norm"))
    handles = _draw_kinds(updates, statistics, lambda layer: layer.get("update_norm"))
    gradients.set(title="Gradients, after clipping", ylabel="norm")
    updates.set(title="Updates")
    for axes in (gradients, updates):
        _scale_by_logarithms(axes)
    legend_below(figure, handles)
    return figure


def _draw_scales(statistics: Statistics, edges: Array) -> Figure:
    figure = Figure(figsize=(7.0, 3.4), layout="constrained")
    lowest, highest, histogram = figure.subplots(1, 3, width_ratios=[1, 1, 1.3])
    handles = _draw_kinds(lowest, statistics, lambda layer: layer["scale"]["at_min"] if "scale" in layer else None)
    _draw_kinds(highest, statistics, lambda layer: layer["scale"]["at_max"] if "scale" in layer else None)
    lowest.set(title="At the smallest scale", ylabel="share of the elements")
    highest.set_title("At the largest scale")
    for axes in (lowest, highest):
        axes.set_ylim(bottom=-0.05 * axes.get_ylim()[1])  # shares are at least 0; the margin shows a line at 0
    shares = scale_shares(statistics)
    mesh = histogram.pcolormesh(
        _borders(statistics),
        edges,
        np.ma.masked_equal(shares.T, 0.0),
        norm=LogNorm(_SMALLEST_SHARE, 1),
        rasterized=True,
    )
    histogram.set(title="All scales", xlabel="step", ylabel="scale", yscale="log")
    histogram.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    histogram.yaxis.set_major_formatter("{x:g}")
    histogram.yaxis.set_minor_formatter(NullFormatter())
    for axes in (lowest, highest, histogram):
        axes.locator_params(axis="x", nbins=4)
    figure.colorbar(mesh, ax=histogram, label="share of the elements", extend="min")
    legend_below(figure, handles)
    return figure


def scale_shares(statistics: Statistics) -> Array:
    """Return the fraction of the model's elements whose scale is in each bin, shape (records, bins)."""
    counts = np.array(
        [
            np.sum([layer["scale"]["histogram"] for layer in record["layers"].values() if "scale" in layer], axis=0)
            for record in statistics.records
        ]
    )
    return np.asarray(counts / counts.sum(axis=1, keepdims=True))


def _draw_preconditioners(statistics: Statistics, factors: list[str]) -> Figure:
    figure = Figure(figsize=(7.0, 2.6 * len(factors) + 0.6), layout="constrained")
    rows = figure.subplots(len(factors), 2, squeeze=False)
    handles: list[Line2D] = []
    for factor, (conditions, ranks) in zip(factors, rows, strict=True):
        handles = _draw_kinds(conditions, statistics, partial(_condition, factor=factor))
        _draw_kinds(ranks, statistics, partial(_rank, factor=factor))
        conditions.axhline(_SINGULAR, color="#777777", linestyle=":", linewidth=0.8)
        title = factor.replace("_", " ").capitalize()
        conditions.set(title=title, ylabel="condition number", yscale="log")
        ranks.set(title=f"{title}: numerical rank", ylabel="share of its side")
    singular = Line2D([], [], color="#777777", linestyle=":", linewidth=0.8, label="singular in float32")
    legend_below(figure, [*handles, singular])
    return figure


def _factors(statistics: Statistics) -> list[str]:
    """Return the names of the preconditioners' factors, in the optimizer's order."""
    layers = [layer for record in statistics.records for layer in record["layers"].values()]
    return list(dict.fromkeys(factor for layer in layers for factor in layer.get("preconditioners", {})))


def _condition(layer: Layer, factor: str) -> float | None:
    found = layer.get("preconditioners", {}).get(factor)
    return None if found is None else _SINGULAR if found["condition"] is None else found["condition"]


def _rank(layer: Layer, factor: str) -> float | None:
    found = layer.get("preconditioners", {}).get(factor)
    return None if found is None else found["rank"] / found["side"]


def _draw_kinds(axes: Axes, statistics: Statistics, value: Value) -> list[Line2D]:
    """Draw a line per kind of weight matrix over a band from minimum to maximum; return the legend's handles."""
    steps = _steps(statistics)
    handles = []
    for index, (kind, names) in enumerate(kinds_of(statistics.header["shapes"]).items()):
        values = np.ma.masked_invalid(values_of(statistics, names, value))
        if values.count() == 0:
            continue
        style = line_style(index)
        if len(names) > 1:
            axes.fill_between(steps, values.min(axis=1), values.max(axis=1), color=style["color"], alpha=0.12, lw=0)
        median = np.ma.median(values, axis=1)  # type: ignore[no-untyped-call]
        axes.plot(steps, median, **style, linewidth=1.2, marker="." if len(steps) == 1 else "")
        handles.append(Line2D([], [], label=kind, linewidth=1.5, **style))
    axes.set_xlabel("step")
    axes.locator_params(axis="x", nbins=6)
    plain_axes(axes)
    return handles


def _scale_by_logarithms(axes: Axes) -> None:
    """Set a log scale unless all values are 0: at learning rate 0, when a warm-up begins, all updates are 0."""
    if any(np.any(np.ma.asarray(line.get_ydata()) > 0) for line in axes.get_lines()):
        axes.set_yscale("log")


def _draw_heat_map(axes: Axes, statistics: Statistics, value: Value) -> QuadMesh:
    """Draw a heat map with a row per parameter, from the model's first layer at the top to its last."""
    names = list(statistics.header["shapes"])
    values = np.ma.masked_less_equal(np.ma.masked_invalid(values_of(statistics, names, value)), 0.0)
    norm = LogNorm() if values.count() else None
    mesh = axes.pcolormesh(_borders(statistics), np.arange(len(names) + 1), values.T, norm=norm, rasterized=True)
    axes.invert_yaxis()
    axes.set_xlabel("step")
    labels = _part_labels(names)
    axes.set_yticks([row for row, _ in labels], [label for _, label in labels], fontsize=6)
    axes.tick_params(axis="y", length=0)
    return mesh


def _part_labels(names: Sequence[str]) -> list[tuple[float, str]]:
    """Return (middle row, name) of the parts of a model (a block, an embedding), without labels that would overlap."""
    labels: list[tuple[float, str]] = []
    row = 0
    for part, members in groupby(names, _part):
        size = len(list(members))
        middle = row + size / 2
        row += size
        if not labels or middle - labels[-1][0] >= _ROW * len(names):
            labels.append((middle, part))
    return labels


def _part(name: str) -> str:
    """Return a parameter's name up to its first index; without an index, up to its last dot."""
    numbered = re.match(r".*?\.\d+", name)
    return numbered[0] if numbered else name.rpartition(".")[0] or name


def _steps(statistics: Statistics) -> Array:
    return np.array([record["step"] for record in statistics.records], dtype=np.float64)


def _borders(statistics: Statistics) -> Array:
    """Return the borders of the columns of a heat map, halfway between the steps of two records."""
    steps = _steps(statistics)
    between = (steps[1:] + steps[:-1]) / 2
    first = steps[0] - (between[0] - steps[0] if len(between) else 0.5)
    last = steps[-1] + (steps[-1] - between[-1] if len(between) else 0.5)
    return np.array([first, *between, last])
