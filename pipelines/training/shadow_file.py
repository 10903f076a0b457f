"""The file of what a run's shadow optimizers would have done."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict

from pipelines.training.record_file import RecordFile, Records

SHADOWS = "shadows.jsonl"
"""Name of the file in the run's folder."""
RUN = "run"
"""Key of the step that the run's own optimizer made."""


class LayerUpdate(TypedDict):
    """The update of one parameter; None for a value that is not finite.

    `cosine` is that of the angle to the run's update; `singular_values` are those of a matrix, descending: all of them,
    or about 32, evenly spaced in rank, of more.
    """

    norm: float | None
    cosine: float | None
    singular_values: list[float]


class LossChange(TypedDict):
    """Change of the mean loss of a batch, in nats.

    `at_lengths`: after a step in this direction with the header's lengths; `own`: after the optimizer's own step.
    """

    at_lengths: list[float]
    own: float


class Direction(TypedDict):
    """The step of an optimizer, over all parameters; `updates` is the number of gradients that it has received."""

    updates: int
    step_ms: float
    norm: float | None
    cosine: float | None
    same_batch: LossChange
    held_out: LossChange
    layers: dict[str, LayerUpdate]


class Record(TypedDict):
    """What optimizers did and would have done at the update that made `step`.

    `directions` has the run's step as `RUN`, and the others by name; their `step_ms` is the mean time of a step since
    the last record. `cost_ms` is the time of the measurement itself.
    """

    step: int
    cost_ms: float
    directions: dict[str, Direction]


class Header(TypedDict):
    """The run's optimizer, the shape of each parameter, and the step lengths as multiples of the run's step."""

    optimizer: str
    shapes: dict[str, list[int]]
    lengths: list[float]


ShadowRecords = Records[Header, Record]
"""Content of a file."""
ShadowFile = RecordFile[Header, Record]


def step_cost(ms: float) -> str:
    """Return the time of a shadow's steps for people, three digits below a second."""
    return f"{ms:,.0f} ms a step" if ms >= 1000 else f"{ms:.3g} ms a step"


def shadow_file(run: Path) -> ShadowFile:
    """Return the file of a run folder."""
    return RecordFile(run / SHADOWS, Header, Record, "shadow optimizers")
