"""The figure of differences (a forest plot): a line for each pair of contenders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from pipelines.analysis.comparison.results import Comparison, Verdict
from pipelines.analysis.comparison.thinning import without_outliers
from pipelines.analysis.figure_style import NEUTRAL_COLOUR, legend_below, plain_axes, row_labels
from pipelines.tasks.metric import Metric

MOST_PAIRS = 30
"""Lines in the figure. Of more pairs, those with the best contender are drawn; with `against`, the first ones."""

_CERTAIN_COLOUR = "#0077BB"


def draw_differences(comparison: Comparison) -> Figure | None:
    """Draw the differences with their corrected intervals; None if no pair was tested."""
    verdicts = _drawn(comparison)
    if not any(verdict.corrected for verdict in verdicts):
        return None
    metric = comparison.metric
    labels, height = row_labels([f"{verdict.first} − {verdict.second}" for verdict in verdicts])
    figure = Figure(figsize=(7.0, 1.0 + height), layout="constrained")
    axes = figure.subplots()
    left, right = _range(verdicts)
    axes.set(xlim=(left, right), ylim=(len(verdicts) - 0.4, -0.6), xlabel=_axis_title(metric))
    axes.axvline(0.0, color="black", linewidth=0.8, zorder=1)
    for row, verdict in enumerate(verdicts):
        _draw_difference(axes, row, verdict, metric)
    axes.set_yticks(range(len(verdicts)), labels)
    plain_axes(axes)
    if metric.is_share:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))
    cut = any(low < left or high > right for low, high in map(_interval, verdicts))
    legend_below(figure, _handles(comparison.confidence, cut))
    return figure


def _drawn(comparison: Comparison) -> Sequence[Verdict]:
    verdicts = comparison.verdicts
    if len(verdicts) > MOST_PAIRS and comparison.against is None:
        verdicts = tuple(verdict for verdict in verdicts if verdict.first == verdicts[0].first)
    return verdicts[:MOST_PAIRS]


def _axis_title(metric: Metric) -> str:
    unit = ", percentage points" if metric.is_share else ""
    side = metric.either("left", "right")
    return f"final validation {metric.name}{unit}\nfirst minus second; {side} of 0, the first is better"


def _range(verdicts: Sequence[Verdict]) -> tuple[float, float]:
    """Return the ends of the axis: around 0 and all intervals except those that reach far beyond the others."""
    parts = [(_mean(verdict), *(verdict.corrected or ())) for verdict in verdicts]
    reach = without_outliers(0.0, [max(map(abs, part)) for part in parts])
    seen = [0.0, *(end for part in parts for end in part if abs(end) <= reach)]
    margin = 0.04 * (max(seen) - min(seen))
    return min(seen) - margin, max(seen) + margin


def _mean(verdict: Verdict) -> float:
    assert verdict.difference is not None
    return verdict.difference.mean


def _interval(verdict: Verdict) -> tuple[float, float]:
    """Return the corrected interval; without one, the mean twice."""
    return verdict.corrected or (_mean(verdict), _mean(verdict))


def _draw_difference(axes: Axes, row: int, verdict: Verdict, metric: Metric) -> None:
    left, right = axes.get_xlim()
    mean = _mean(verdict)
    certain = verdict.outcome != "cannot tell"
    look: dict[str, Any] = {"color": _CERTAIN_COLOUR if certain else NEUTRAL_COLOUR, "markersize": 4.5, "zorder": 3}
    low, high = _interval(verdict)
    if left <= mean <= right:
        axes.plot([max(low, left), min(high, right)], [row, row], color=look["color"], linewidth=1.4, zorder=2)
        axes.plot(mean, row, marker="o", markerfacecolor=look["color"] if certain else "white", **look)
    else:
        text: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 7}
        edge, shift, side = (right, -6, "right") if mean > 0 else (left, 6, "left")
        axes.annotate(metric.difference(mean, "+"), (edge, row), xytext=(shift, 0), ha=side, **text)
    if low < left:
        axes.plot(left, row, marker="<", clip_on=False, **look)
    if high > right:
        axes.plot(right, row, marker=">", clip_on=False, **look)


def _handles(confidence: float, cut: bool) -> list[Line2D]:
    look: dict[str, Any] = {"marker": "o", "markersize": 4.5}
    interval = f"{confidence:.0%} interval, corrected"
    handles = [
        Line2D([], [], color=_CERTAIN_COLOUR, label=f"certain; {interval}", **look),
        Line2D([], [], color=NEUTRAL_COLOUR, label="not certain", markerfacecolor="white", **look),
    ]
    arrow: dict[str, Any] = {**look, "marker": "<", "linestyle": "", "label": "beyond the axis"}
    return [*handles, Line2D([], [], color=NEUTRAL_COLOUR, **arrow)] if cut else handles
