"""The class of task descriptions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.tasks.metric import LOSS, Metric

if TYPE_CHECKING:
    import torch

    from pipelines.training.checkpoint import Checkpoint
    from pipelines.training.distributed import Ranks
    from pipelines.training.task import Task

Exporter = Callable[["Checkpoint", Any, Path, Path], str]
"""Called with a checkpoint, its configuration, the folder to write into, and the folder's final path; returns a command
that loads the model."""


@dataclass(frozen=True)
class TaskDescription:
    """Everything that the program knows about a task. Callables receive configurations of this task only."""

    name: str
    """The value of `task` in a configuration."""
    summary: str
    """What `asgo train` does, for `--help`."""
    examples: tuple[str, ...]
    """Example commands, for `--help`."""
    model: str
    """The model in words, with its article."""
    unit: str
    """Unit of progress and throughput: tokens or images."""
    short_unit: str
    """Abbreviation of the unit."""
    samples: str
    """What the rows of a batch are."""
    data: str
    """What the data folder holds, and the command that makes it; for `--help`."""
    presets: tuple[str, ...]
    """Names of presets; the first is the default."""
    options: frozenset[str]
    """Options of `asgo train` that only this task has."""
    open_data: Callable[[Path], object]
    """Opens a data folder. Raises `AsgoError` if it is not valid."""
    build: Callable[[Any, torch.device, Ranks], Task]
    """Opens the data and builds the model, or this rank's shard of it."""
    units_per_sample: Callable[[Any], int]
    """Tokens in a sequence; 1 for images."""
    length: Callable[[Any], Fraction]
    """Length of a run in units, from the settings that replace `training.steps`; may open the data.

    It is exact for the decimal number that the user wrote: 1.1 epochs of 100 images are 110 images, but `1.1 * 100` is
    more.
    """
    exporters: Mapping[str, Exporter]
    """Exporters by `--format` of `asgo export-model`."""
    writes_text: bool = False
    """Whether `asgo generate` supports its checkpoints."""
    command: str = ""
    """Subcommand of `asgo train`; the name if empty."""
    metrics: tuple[Metric, ...] = (LOSS,)
    """Metrics of a validation by which runs can be compared; the first is the default of `asgo compare`."""
