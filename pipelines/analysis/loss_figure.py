"""Figure of training and validation losses, one curve per run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pipelines.analysis.comparison.thinning import moving_mean
from pipelines.analysis.figure_style import figure_style, legend_below, line_style, plain_axes, save_figure

Array = npt.NDArray[np.float64]

_SMOOTHED = 0.04  # the training loss is averaged over this fraction of the run


@dataclass(frozen=True)
class LossCurve:
    """Losses of one run and the steps at which they were recorded, ascending. Any list may be empty."""

    label: str
    train_steps: Sequence[int]
    train_losses: Sequence[float]
    val_steps: Sequence[int]
    val_losses: Sequence[float]


def draw_losses(curves: Sequence[LossCurve], path: Path) -> None:
    """Draw all runs and, enlarged, their second halves; write the figure to `path` (.png, .pdf or .svg).

    Raises `UsageError` for another file type.
    """
    with figure_style():
        figure = Figure(figsize=(7.0, 3.2), layout="constrained")
        whole, enlarged = figure.subplots(1, 2)
        for axes in (whole, enlarged):
            _draw_curves(axes, curves)
        whole.set(ylabel="loss", title="Whole run")
        enlarged.set_title("Second half")
        _show_second_half(enlarged, curves)
        legend_below(figure, _legend_handles(curves))
        save_figure(figure, path)


def _draw_curves(axes: Axes, curves: Sequence[LossCurve]) -> None:
    for index, curve in enumerate(curves):
        style = line_style(index)
        axes.plot(*smoothed(curve), **style, linewidth=0.7, alpha=0.65)
        axes.plot(curve.val_steps, curve.val_losses, **style, linewidth=1.5, marker="o", markersize=3)
    axes.set_xlabel("step")
    axes.locator_params(axis="x", nbins=6)
    plain_axes(axes)


def smoothed(curve: LossCurve) -> tuple[Array, Array]:
    """Return steps and the moving mean of the training loss, without losses that are not finite."""
    steps, losses = np.array(curve.train_steps, dtype=np.float64), np.array(curve.train_losses, dtype=np.float64)
    steps, losses = steps[np.isfinite(losses)], losses[np.isfinite(losses)]
    return steps, moving_mean(losses, int(len(losses) * _SMOOTHED / 2))


def _show_second_half(axes: Axes, curves: Sequence[LossCurve]) -> None:
    points = [np.stack(smoothed(curve), axis=1) for curve in curves]
    points += [np.array([*zip(curve.val_steps, curve.val_losses, strict=True)]).reshape(-1, 2) for curve in curves]
    steps, losses = np.concatenate(points).T
    if not len(steps):
        return
    last = steps.max()
    shown = losses[(steps >= last / 2) & np.isfinite(losses)]
    if last > 0 and len(shown):
        margin = 0.06 * max(float(np.ptp(shown)), 1e-3)
        axes.set(xlim=(last / 2, last * 1.02), ylim=(shown.min() - margin, shown.max() + margin))


def _legend_handles(curves: Sequence[LossCurve]) -> list[Line2D]:
    handles = []
    for index, curve in enumerate(curves):
        final = f" ({curve.val_losses[-1]:.4f})" if curve.val_losses else ""
        handles.append(Line2D([], [], label=curve.label + final, linewidth=1.5, **line_style(index)))
    validation = Line2D([], [], color="#777777", marker="o", markersize=3, label="validation (last loss)")
    training = Line2D([], [], color="#777777", linewidth=0.7, label="training, smoothed")
    return [*handles, validation, training]
