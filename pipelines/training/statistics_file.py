"""The file of a run's layer statistics."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict

from pipelines.training.record_file import RecordFile, Records

STATISTICS = "statistics.jsonl"
"""Name of the file in the run's folder."""


class Scale(TypedDict):
    """Scales of a parameter's elements: mean, fractions at the clamps, and counts per bin."""

    mean: float | None
    at_min: float
    at_max: float
    histogram: list[int]


class Preconditioner(TypedDict):
    """Eigenvalues of a factor, shape (side, side). Like `optim.inspection.Spectrum`, with None for infinity."""

    side: int
    largest: float | None
    smallest: float | None
    rank: int
    condition: float | None
    largest_condition: float | None


class Layer(TypedDict, total=False):
    """What a step did to one parameter; None for a value that is not finite.

    `grad_norm` is after clipping, `weight_norm` before the step. `update_norm` is the norm of the change, including
    weight decay; `update_to_weight` is `update_norm / weight_norm`.
    """

    grad_norm: float | None
    weight_norm: float | None
    update_norm: float | None
    update_to_weight: float | None
    scale: Scale
    preconditioners: dict[str, Preconditioner]


class Record(TypedDict):
    """Layers by parameter name for the update that made `step`; `cost_ms` is the time of the measurement."""

    step: int
    cost_ms: float
    layers: dict[str, Layer]


class Header(TypedDict):
    """Shape of each parameter, and bin edges of the scales; None if the optimizer has no scales."""

    shapes: dict[str, list[int]]
    scale_edges: list[float] | None


Statistics = Records[Header, Record]
"""Content of a file."""
StatisticsFile = RecordFile[Header, Record]


def statistics_file(run: Path) -> StatisticsFile:
    """Return the file of a run folder's layer statistics."""
    return RecordFile(run / STATISTICS, Header, Record, "layer statistics")


def read_statistics(path: Path) -> Statistics | None:
    """Read a run's file; raises like `RecordFile.read`."""
    return statistics_file(path.parent).read()
