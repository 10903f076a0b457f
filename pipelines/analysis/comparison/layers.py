"""The layer statistics of the compared runs, as figures: of one run of each contender that has recorded them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.analysis.comparison.results import Entry
from pipelines.analysis.layer_figures import write_layer_figures
from pipelines.training.statistics_file import STATISTICS

FOLDER = "layers"
"""Inside the folder of figures."""

MOST_SHOWN = 6
"""Contenders; each has up to four figures."""

_WORDS = {
    "layer-updates": "How far an update moves the weights, as a share of their norm",
    "layer-norms": "Norms of the gradients and of the updates",
    "layer-scales": "How the scales of the steps are distributed",
    "layer-preconditioners": "Condition numbers of the preconditioners",
}


@dataclass(frozen=True)
class LayerFigures:
    """The figures of one run."""

    run: str
    images: tuple[tuple[str, bytes], ...]
    """What each shows, and its PNG file."""


def write_layers(contenders: Sequence[Entry], figures: Path) -> list[LayerFigures]:
    """Draw those that have statistics, as PNG and PDF, into `figures/layers/NAME-OF-THE-RUN`.

    Raises `AsgoError` for a file of statistics that cannot be read.
    """
    runs = [next((run for run in entry.runs if _has_statistics(run.path)), None) for entry in contenders]
    drawn = []
    for run in [run for run in runs if run is not None][:MOST_SHOWN]:
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", run.name)
        paths = write_layer_figures(run.path, figures / FOLDER / name)
        images = [(_WORDS[path.stem], path.read_bytes()) for path in paths if path.suffix == ".png"]
        drawn.append(LayerFigures(run.name, tuple(images)))
    return drawn


def _has_statistics(run: Path) -> bool:
    """Whether there is a record behind the first line, which says what was measured."""
    try:
        with (run / STATISTICS).open("rb") as file:
            return sum(line.endswith(b"\n") for line, _ in zip(file, range(2), strict=False)) == 2
    except OSError:
        return False
