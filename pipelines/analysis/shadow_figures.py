"""Figures of a run's shadow optimizers: direction, length, effect on the loss, and singular values of their steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pipelines.analysis.figure_style import (
    band_handle,
    figure_style,
    legend_below,
    line_style,
    literal,
    plain_axes,
    save_figures,
)
from pipelines.analysis.layer_figures import kinds_of
from pipelines.errors import UsageError
from pipelines.training.shadow_file import (
    RUN,
    Direction,
    LayerUpdate,
    LossChange,
    Record,
    ShadowRecords,
    shadow_file,
    step_cost,
)

Array = npt.NDArray[np.float64]

_MOST_KINDS = 6
_COLUMNS = 3


def draw_shadows(run: Path) -> list[tuple[str, Figure]]:
    """Return the figures of a run's shadows, each with a file name; save them inside `figure_style`.

    Raises `UsageError` for a run without records of shadows.
    """
    shadows = shadow_file(run).read()
    if shadows is None or not shadows.records:
        raise UsageError(f"{run}: has no shadow optimizers; train with --set 'shadows.optimizers=[\"muon\"]'")
    with figure_style():
        return [
            ("shadow-steps", _draw_steps(shadows)),
            ("shadow-losses", _draw_losses(shadows)),
            ("shadow-spectra", _draw_spectra(shadows)),
        ]


def write_shadow_figures(run: Path, out: Path) -> list[Path]:
    """Draw a run's shadows into the folder `out`, each figure as PNG and PDF; return the files."""
    return save_figures(draw_shadows(run), out)


def shadow_names(shadows: ShadowRecords) -> list[str]:
    """Return the names of the shadows of any record, in their order."""
    return list(dict.fromkeys(name for record in shadows.records for name in record["directions"] if name != RUN))


def later_half(shadows: ShadowRecords) -> list[Record]:
    """Return the records over which medians are taken."""
    return shadows.records[len(shadows.records) // 2 :]


def _draw_steps(shadows: ShadowRecords) -> Figure:
    figure = Figure(figsize=(7.0, 3.4), layout="constrained")
    cosines, lengths = figure.subplots(1, 2)
    for index, name in enumerate(shadow_names(shadows)):
        style = line_style(index + 1)
        _draw_over_steps(cosines, shadows, name, style, lambda of_layer, _: of_layer["cosine"])
        _draw_over_steps(lengths, shadows, name, style, norm_ratio)
    own = literal(shadows.header["optimizer"])
    cosines.set(title=f"Cosine with the step of {own}", ylabel="cosine")
    lengths.set(title=f"Length, {own} = 1", ylabel="norm of the step / norm of its step", yscale="log")
    for axes in (cosines, lengths):
        axes.set_xlabel("step")
        axes.locator_params(axis="x", nbins=6)
        plain_axes(axes)
    handles = _handles(shadows, 1)
    for handle, name in zip(handles, shadow_names(shadows), strict=True):
        found = [record["directions"][name] for record in shadows.records if name in record["directions"]]
        handle.set_label(f"{name}, {step_cost(_median(each['step_ms'] for each in found))}")
    if cosines.collections or lengths.collections:
        handles.append(band_handle("middle half of the weight matrices"))
    legend_below(figure, handles)
    return figure


Measured = LayerUpdate | Direction
Value = Callable[[Measured, Measured], float | None]
"""One value of a shadow's update and the run's: of a layer, or of all."""


def norm_ratio(shadow: Measured, run: Measured) -> float | None:
    """Return the length of a shadow's update as a multiple of the run's; None if one of them is unknown or 0."""
    return shadow["norm"] / run["norm"] if shadow["norm"] is not None and run["norm"] else None


def _draw_over_steps(axes: Axes, shadows: ShadowRecords, name: str, style: dict[str, object], value: Value) -> None:
    """Draw the value over all parameters, in a band from the lower to the upper quartile of the weight matrices."""
    records = [record for record in shadows.records if name in record["directions"]]
    steps = [record["step"] for record in records]
    pairs = [(record["directions"][name], record["directions"][RUN]) for record in records]
    matrices = [key for key, shape in shadows.header["shapes"].items() if len(shape) > 1]
    whole = _array(value(*pair) for pair in pairs)
    layers = np.array(
        [
            _array(value(mine["layers"][key], run["layers"][key]) for key in matrices if key in mine["layers"])
            for mine, run in pairs
        ]
    )
    if np.isfinite(layers).any(axis=1).all():
        low, high = np.nanquantile(layers, [0.25, 0.75], axis=1)
        axes.fill_between(steps, low, high, color=str(style["color"]), alpha=0.12, lw=0)
    axes.plot(steps, whole, **style, linewidth=1.2, marker="." if len(steps) == 1 else "")  # type: ignore[arg-type]


def _array(values: Iterable[float | None]) -> Array:
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


def _median(values: Iterable[float | None]) -> float:
    """Return the median of the finite values; NaN if there are none."""
    finite = [value for value in values if value is not None]
    return float(np.median(finite)) if finite else math.nan


def _draw_losses(shadows: ShadowRecords) -> Figure:
    figure = Figure(figsize=(7.0, 3.6), layout="constrained")
    same, held_out = figure.subplots(1, 2)  # not one scale: on the next batch, changes may be a hundredth
    later = later_half(shadows)
    for axes, batch in ((same, "same_batch"), (held_out, "held_out")):
        for index, name in enumerate([RUN, *shadow_names(shadows)]):
            _draw_loss(axes, later, name, shadows.header["lengths"], batch, line_style(index))
        axes.axhline(0, color="#777777", linewidth=0.8)
        axes.set(xlabel="length of the step / length of the run's step", xscale="log")
        axes.set_xticks(shadows.header["lengths"], [f"{length:g}" for length in shadows.header["lengths"]])
        axes.set_xticks([], minor=True)
        plain_axes(axes)
    same.set(title="On the batch of the step", ylabel="change of the loss, nats")
    held_out.set(title="On the next batch")
    own = Line2D([], [], color="#777777", linestyle="", marker="o", markersize=4, label="its own length")
    legend_below(figure, [*_handles(shadows, 0), own])
    return figure


def _draw_loss(
    axes: Axes, records: Sequence[Record], name: str, lengths: Sequence[float], batch: str, style: dict[str, object]
) -> None:
    """Draw the median over records of the loss after steps of these lengths; a dot at the optimizer's own length."""
    found = [record["directions"] for record in records if name in record["directions"]]
    changes: list[LossChange] = [directions[name][batch] for directions in found]  # type: ignore[literal-required]
    if not changes:
        return
    medians = np.ma.median(np.ma.masked_invalid([_array(change["at_lengths"]) for change in changes]), axis=0)  # type: ignore[no-untyped-call]
    axes.plot(lengths, medians, **style, linewidth=1.2)  # type: ignore[arg-type]
    ratio = _median(norm_ratio(directions[name], directions[RUN]) for directions in found)
    own = _median(change["own"] for change in changes)
    if lengths[0] / 2 <= ratio <= lengths[-1] * 2:
        axes.plot([ratio], [own], color=str(style["color"]), marker="o", markersize=4)


def _draw_spectra(shadows: ShadowRecords) -> Figure:
    last = shadows.records[-1]
    kinds = list(kinds_of(shadows.header["shapes"]).items())[-_MOST_KINDS:]
    columns = min(_COLUMNS, max(1, len(kinds)))
    rows = -(-len(kinds) // columns) or 1
    figure = Figure(figsize=(7.0, 2.2 * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes, (kind, names) in zip(grid.flat, kinds, strict=False):
        axes.set_title(literal(kind))
        for index, name in enumerate([RUN, *shadow_names(shadows)]):
            if name in last["directions"]:
                _draw_spectrum(axes, [last["directions"][name]["layers"].get(layer) for layer in names], index)
        axes.set_yscale("log")
        axes.set_ylim(1e-3, 1.3)
        plain_axes(axes)
    for axes in grid.flat[len(kinds) :]:
        axes.set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("rank / side")
    for axes in grid[:, 0]:
        axes.set_ylabel("singular value / largest")
    legend_below(figure, _handles(shadows, 0))
    return figure


def _draw_spectrum(axes: Axes, layers: Sequence[LayerUpdate | None], index: int) -> None:
    """Draw the median over layers of the singular values of their updates, relative to the largest.

    Layers of one kind may have different sizes, as in a residual network: shorter spectra are interpolated.
    """
    found = [_array(layer["singular_values"]) for layer in layers if layer is not None and layer["singular_values"]]
    relative = [values / values[0] for values in found if values[0] > 0]
    if relative:
        ranks = np.linspace(0, 1, max(map(len, relative)))
        aligned = [np.interp(ranks, np.linspace(0, 1, len(values)), values) for values in relative]
        axes.plot(ranks, np.median(aligned, axis=0), **line_style(index), linewidth=1.2)


def _handles(shadows: ShadowRecords, first: int) -> list[Line2D]:
    """Return the legend's handles: the run's optimizer, unless `first` is 1, and its shadows."""
    names = [f"{shadows.header['optimizer']} (the run)", *shadow_names(shadows)]
    return [
        Line2D([], [], label=name, linewidth=1.5, **line_style(index))
        for index, name in enumerate(names)
        if index >= first
    ]
