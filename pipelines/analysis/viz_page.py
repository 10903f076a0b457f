"""The interactive page of `asgo viz`: one self-contained file that needs no network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.analysis.comparison.thinning import keep_spikes
from pipelines.analysis.figure_style import plotly_line
from pipelines.analysis.page_template import render
from pipelines.storage import write_output

Array = npt.NDArray[np.float64]

GRID_COLOUR = "#e4e4e4"
_MOST_POINTS = 1200  # of a curve: about two per pixel of its width
_DECADES = 12  # most decades on an axis of values


@dataclass(frozen=True)
class PagePanel:
    """A plot with its heading: plotly's traces and layout; `frames` are the steps of a slider, if any."""

    heading: str
    formula: str
    traces: list[dict[str, Any]] = field(repr=False)
    layout: dict[str, Any] = field(repr=False)
    frames: list[int] = field(default_factory=list)


def write_page(panels: Sequence[PagePanel], path: Path) -> None:
    """Write a page with these plots."""
    title = ", ".join(panel.heading for panel in panels)
    page = render(Path(__file__).parent / "viz_template", title=title, panels=panels)
    write_output(path, page.encode())


def line(index: int, label: str, width: float = 2.0) -> dict[str, Any]:
    """Return the common properties of a setting's traces, by its position in the legend: a click hides all of them."""
    return {"mode": "lines", "name": label, "legendgroup": str(index), "line": plotly_line(index, width)}


def value_curve(values: Array, minimum: float) -> dict[str, Any]:
    """Return a trace of the values, `(steps + 1,)`, above the minimum; hovering shows the value.

    Thins a long run, but keeps the lowest and the highest value of each section. Raises 0 to a tiny value: its
    logarithm would leave a gap.
    """
    kept = keep_spikes(values, _MOST_POINTS)
    return {
        "x": kept.tolist(),
        "y": short(np.maximum(values[kept] - minimum, np.finfo(np.float64).tiny)),
        "customdata": [[int(step), value] for step, value in zip(kept, short(values[kept]), strict=True)],
        "hovertemplate": "step %{x:,d}<br>value %{customdata[1]:.5g}",
    }


def value_axis(title: str, curves: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a log axis for these curves: at most twelve decades below the highest value."""
    heights = np.concatenate([curve["y"] for curve in curves])
    highest = math.log10(float(heights.max()))
    lowest = max(math.log10(float(heights.min())), highest - _DECADES)
    return {
        "type": "log",
        "range": [lowest - 0.2, highest + 0.2],
        "title": {"text": title},
        "gridcolor": GRID_COLOUR,
        "exponentformat": "power",
    }


def short(values: Array) -> list[float]:
    """Round the values to six digits, to keep the page small."""
    return [float(f"{value:.6g}") for value in values.tolist()]
