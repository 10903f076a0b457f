"""Common style of all figures, and saving them."""

from __future__ import annotations

import io
import itertools
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter

from pipelines.errors import UsageError
from pipelines.storage import write_output

# From Paul Tol's schemes (https://sronpersonalpages.nl/~pault/), without orange and purple, which mark a trajectory's
# start and the optimum.
_COLOURS = ("#0077BB", "#CC3311", "#111111", "#009988", "#EE3377", "#33BBEE", "#997700", "#223388")
# Lengths of dashes and gaps, in line widths. Each colour has its own pattern: colour-blind readers cannot distinguish
# red and ochre, and in grey most colours look alike.
_DASHES: tuple[tuple[float, ...], ...] = (
    (),
    (6, 2),
    (1.2, 1.3),
    (6, 1.5, 1.2, 1.5),
    (10, 2.5),
    (3, 1.5),
    (6, 1.5, 1.2, 1.5, 1.2, 1.5),
    (10, 2, 3, 2),
)
_TURN = 2  # shift of the dashes each time the colours repeat, so red and ochre never have the same dashes
MOST_STYLES = 24
"""Lines that are easy to distinguish: every colour with three dash patterns."""

START_COLOUR = "#FF9E1B"
OPTIMUM_COLOUR = "#7B1FA2"
NEUTRAL_COLOUR = "#777777"
"""Colour of targets, and of marks in a legend."""
TARGET: dict[str, Any] = {"color": NEUTRAL_COLOUR, "linewidth": 0.9, "linestyle": (0, (1, 2))}

_ROW_LETTERS = 44
_EDGE = 0.05  # inches between a legend and the figure's edge
_LETTERS = (8.0, 7.0, 6.5)  # font sizes of a legend, in points
# Of a legend, in em. The handle is long enough for every dash pattern.
_HANDLE, _PADDING, _SPACING, _BORDER = 3.2, 0.8, 1.5, 0.4
_SHORTEST = 8.0  # em: minimum line length of a wrapped label
_USUAL_LINES = 3
_GAP = 3.0  # pixels around a tick label
_ATTEMPTS = 5  # at the layout of a figure; each halves the crowded labels
_USUAL_LEGEND = 0.5  # inches: legend height that figures have room for

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # ships with matplotlib: figures are the same on every machine
    "font.size": 8,
    "figure.dpi": 200,  # text is measured at the resolution at which it is drawn
    "axes.titlesize": 9,
    "axes.labelsize": 8,
    "axes.labelpad": 2,
    "axes.linewidth": 0.6,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.columnspacing": _SPACING,
    "legend.handlelength": _HANDLE,
    "legend.handletextpad": _PADDING,
    "legend.borderpad": _BORDER,
    "legend.labelspacing": 0.3,
    "pdf.fonttype": 42,  # TrueType: journals refuse Type 3 fonts
    "svg.fonttype": "none",  # keep text as text
    "svg.hashsalt": "asgo",
}

# No timestamps and versions: the same data give the same file.
_METADATA: dict[str, dict[str, Any]] = {
    ".png": {"Software": "asgo"},
    ".pdf": {"Creator": "asgo", "Producer": "asgo", "CreationDate": None},
    ".svg": {"Creator": "asgo", "Date": None},
}


@contextmanager
def figure_style() -> Iterator[None]:
    """Context manager for drawing and saving: isolates our matplotlib settings from the user's."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def line_style(index: int) -> dict[str, Any]:
    """Return colour and dashes for a position in the legend; the first eight differ in both."""
    dashes = _dashes(index)
    return {"color": _COLOURS[index % len(_COLOURS)], "linestyle": (0, dashes) if dashes else "-"}


def plotly_line(index: int, width: float) -> dict[str, Any]:
    """Return the same style for plotly, `width` pixels wide."""
    dash = ",".join(f"{length * width:g}px" for length in _dashes(index))
    return {"color": _COLOURS[index % len(_COLOURS)], "dash": dash or "solid", "width": width}


def _dashes(index: int) -> tuple[float, ...]:
    return _DASHES[(index + _TURN * (index // len(_COLOURS))) % len(_DASHES)]


def band_handle(label: str) -> Line2D:
    """Return the legend's handle for the bands of a figure, whatever their colours."""
    return Line2D([], [], color=NEUTRAL_COLOUR, alpha=0.3, linewidth=6, label=label)


def legend_below(figure: Figure, handles: Sequence[Line2D]) -> None:
    """Add one legend below the whole figure, of minimum height for the figure's width, with nothing cut off.

    Labels are plain text, not formulas, and wrapped where that saves height. The font gets smaller before the legend
    gets high. If the legend needs more than its usual height, the figure grows: the axes keep their size.
    """
    canvas: Any = FigureCanvasAgg(figure)  # its methods have no types
    renderer = canvas.get_renderer()
    labels = [str(handle.get_label()) for handle in handles]
    letters = FontProperties(size=_LETTERS[0])
    em = renderer.points_to_pixels(_LETTERS[0])
    widths = [renderer.get_text_width_height_descent(label, letters, ismath=False)[0] / em for label in labels]
    room = figure.get_figwidth() - 2 * _EDGE
    while True:
        size, columns, shown = _arrange(labels, widths, room * 72)
        legend = figure.legend(handles, shown, loc="outside lower center", ncols=columns, fontsize=size)
        disable_math(legend)
        box = legend.get_window_extent(renderer)
        if (box.x0 >= 0 and box.x1 <= figure.bbox.width) or room < 1:
            break
        legend.remove()  # wrapping assumes characters of mean width: retry with less room if lines are wider
        room *= 0.95
    figure.set_figheight(figure.get_figheight() + max(0.0, box.height / figure.dpi - _USUAL_LEGEND))


def _arrange(labels: Sequence[str], widths: Sequence[float], room: float) -> tuple[float, int, list[str]]:
    """Return font size, number of columns, and wrapped labels of the lowest legend that fits `room` points.

    `widths` are those of the labels, in em. Takes the first font size that makes the legend no higher than usual.
    """
    found = []
    for size in _LETTERS:
        for columns in range(1, len(labels) + 1):
            shown = _wrapped_to(labels, widths, columns, room / size)
            lines = [sum(label.count("\n") + 1 for label in part) for part in np.array_split(shown, columns)]
            if shown:
                found.append((max(lines) * size, columns, size, shown))
        if found and min(found)[0] <= _USUAL_LINES * _LETTERS[0]:
            break
    _, columns, size, shown = min(found, default=(0.0, 1, _LETTERS[-1], list(labels)))
    return size, columns, shown


def _wrapped_to(labels: Sequence[str], widths: Sequence[float], columns: int, room: float) -> list[str]:
    """Return the labels, wrapped to fit `room` em in so many columns; an empty list if lines would be too short."""
    beside = 2 * _BORDER + columns * (_HANDLE + _PADDING) + (columns - 1) * _SPACING
    if beside + sum(max(part) for part in np.array_split(widths, columns)) <= room:
        return list(labels)
    share = (room - beside) / columns
    if share < _SHORTEST:
        return []
    return [
        label if width <= share else textwrap.fill(label, max(1, int(len(label) * share / width)))
        for label, width in zip(labels, widths, strict=True)
    ]


def disable_math(legend: Legend) -> None:
    """Show the labels of a legend as plain text, not as formulas."""
    for text in legend.get_texts():
        text.set_parse_math(False)


def literal(label: str) -> str:
    """Return the label with `$` escaped, so matplotlib does not parse a formula."""
    return label.replace("$", r"\$")


def row_labels(labels: Sequence[str]) -> tuple[list[str], float]:
    """Return labels of rows, wrapped to less than half of the width, and the height of all rows in inches."""
    wrapped = [literal(textwrap.fill(label, _ROW_LETTERS)) for label in labels]
    lines = max(label.count("\n") for label in wrapped) + 1
    return wrapped, len(wrapped) * (0.1 + 0.13 * lines)


def plain_axes(axes: Axes) -> None:
    """Add a light grid behind the data, and remove the frame at the top and right."""
    axes.grid(color="#e4e4e4", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def lay_out(figure: Figure) -> None:
    """Run the layout, once for all formats. Thins tick labels that overlap."""
    for _ in range(_ATTEMPTS):
        engine = figure.get_layout_engine()
        if engine is None:
            return
        engine.execute(figure)
        axes = [each for parent in figure.axes for each in (parent, *parent.child_axes)]
        crowded = [axis for each in axes for axis in (each.xaxis, each.yaxis) if is_crowded(axis)]
        for axis in crowded:
            _thin(axis)
        if not crowded:
            break
    figure.set_layout_engine("none")


def is_crowded(axis: Axis) -> bool:
    """Return whether tick labels overlap."""
    low, high = sorted(axis.get_view_interval())
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    labels = [tick.label1 for tick in ticks if low <= tick.get_loc() <= high and tick.label1.get_text()]
    boxes = [label.get_window_extent().padded(_GAP) for label in labels if label.get_visible()]
    return any(first.overlaps(second) for first, second in itertools.combinations(boxes, 2))


def _thin(axis: Axis) -> None:
    """Show fewer labels: none between powers of ten, or about half of the others."""
    locator = axis.get_major_locator()
    if isinstance(locator, MaxNLocator):
        locator.set_params(nbins=max(2, len(axis.get_majorticklocs()) // 2))
    elif isinstance(locator, FixedLocator):
        labels = [label.get_text() for label in axis.get_majorticklabels()]
        kept = [place for place, text in enumerate(labels) if text][::2]
        axis.set_ticks(axis.get_majorticklocs(), [text if at in kept else "" for at, text in enumerate(labels)])
    else:
        axis.set_minor_formatter(NullFormatter())


def check_figure_path(path: Path, more: str = "") -> None:
    """Raise `UsageError` unless the suffix is a supported format; `more` ends the message."""
    if path.suffix.lower() not in _METADATA:
        raise UsageError(f"{path}: the name of a figure must end in {', '.join(_METADATA)}{more}")


def save_figures(figures: Iterable[tuple[str, Figure]], out: Path) -> list[Path]:
    """Write figures into the folder `out`, each as PNG and PDF; return the files."""
    paths = [(figure, out / f"{name}{suffix}") for name, figure in figures for suffix in (".png", ".pdf")]
    with figure_style():
        for figure, path in paths:
            save_figure(figure, path)
    return [path for _, path in paths]


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure atomically, in the format of the suffix; make the folder if necessary."""
    check_figure_path(path)
    suffix = path.suffix.lower()
    content = io.BytesIO()
    lay_out(figure)
    figure.savefig(content, format=suffix.removeprefix("."), metadata=_METADATA[suffix])
    write_output(path, content.getvalue())
