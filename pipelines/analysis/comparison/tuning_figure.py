"""The figure of tuning budgets: the best value after k trials of each contender."""

from __future__ import annotations

from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from pipelines.analysis.comparison.results import Comparison
from pipelines.analysis.comparison.tables import digits
from pipelines.analysis.comparison.thinning import without_outliers
from pipelines.analysis.comparison.tuning_words import are_alike
from pipelines.analysis.figure_style import MOST_STYLES, band_handle, legend_below, line_style, plain_axes


def draw_tuning(comparison: Comparison) -> Figure | None:
    """Draw a line, and if it is an expectation a band, for each contender; None without trials."""
    tunings = comparison.tunings[:MOST_STYLES]
    if not tunings:
        return None
    metric = comparison.metric
    figure = Figure(figsize=(7.0, 3.4), layout="constrained")
    axes = figure.subplots()
    labels = [*(entry.label for entry in comparison.contenders), *(each.label for each in tunings)]
    known = list(dict.fromkeys(labels))
    handles = []
    for each in tunings:
        style, trials = line_style(known.index(each.label)), np.arange(1, each.counted + 1)
        if each.band is not None:
            axes.fill_between(trials, *each.band, color=style["color"], alpha=0.15, linewidth=0)
        shape = "default" if each.is_expected else "steps-post"
        # Marks: a line with one trial has no length.
        axes.plot(trials, each.best, **style, linewidth=1.1, marker=".", markersize=3.5, drawstyle=shape)
        handles.append(Line2D([], [], label=each.label, linewidth=1.5, **style))
    if any(each.is_expected for each in tunings):
        band = f"{comparison.confidence:.0%} bootstrap interval"
        handles.append(band_handle(band))
    _leave_out_bad(axes, comparison)
    steps = {each.whole_trial("steps") for each in tunings}
    length = f" of {steps.pop():,.0f} steps" if len(steps) == 1 else ""
    axes.set(xlabel=f"trials{length}", ylabel=f"best validation {metric.name} of the trials")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    plain_axes(axes)
    if metric.is_share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _add_tokens(axes, comparison)
    legend_below(figure, handles)
    return figure


def _leave_out_bad(axes: Axes, comparison: Comparison) -> None:
    """Limit the axis to the values of the lines, without outliers: a few trials that diverged would hide the rest."""
    metric = comparison.metric
    costs = metric.sign * np.concatenate([each.best for each in comparison.tunings])
    low, high = float(costs.min()), without_outliers(float(costs.min()), costs.tolist())
    margin = 0.06 * max(high - low, 1e-3)
    axes.set_ylim(metric.either((low - margin, high + margin), (-high - margin, -low + margin)))


def _add_tokens(axes: Axes, comparison: Comparison) -> None:
    """Add a second axis with the tokens of whole trials, if all contenders' trials have the same length."""
    if not are_alike(comparison.tunings):
        return
    each = comparison.tunings[0].whole_trial("tokens")
    if each <= 0:
        return
    top = axes.secondary_xaxis("top", functions=(partial(np.multiply, each), partial(np.multiply, 1 / each)))
    top.xaxis.set_major_formatter(FuncFormatter(lambda value, _: digits(value)))
    top.set_xlabel(f"{comparison.unit} of whole trials")
