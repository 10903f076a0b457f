"""The form of a task's description."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from pipelines.training.checkpoint import Checkpoint
    from pipelines.training.distributed import Ranks
    from pipelines.training.task import Task

Exporter = Callable[["Checkpoint", Any, Path, Path], str]
"""Takes a checkpoint, its configuration, the folder to write into, and where that folder will lie; returns a command
that loads the model."""


@dataclass(frozen=True)
class TaskDescription:
    """What the program must know of a task. Fields that take a configuration take one of this task."""

    name: str
    summary: str
    """What `asgo train` does with it, for `--help`."""
    examples: tuple[str, ...]
    """Commands, for `--help`."""
    model: str
    """What is trained, with its article."""
    unit: str
    """What is counted: tokens or images."""
    short_unit: str
    """The unit where there is little room."""
    samples: str
    """The rows of a batch."""
    data: str
    """What lies in the data folder, and the command that makes it; for `--help`."""
    presets: tuple[str, ...]
    """The default first."""
    options: frozenset[str]
    """Options of `asgo train` that this task has and others do not."""
    open_data: Callable[[Path], object]
    """Opens a data folder. Raises `AsgoError` if it cannot be trained on."""
    build: Callable[[Any, torch.device, Ranks], Task]
    """Opens the data and builds the model of a configuration, or this process's shard of it."""
    units_per_sample: Callable[[Any], int]
    """Tokens in a sequence; 1 for images."""
    exporters: Mapping[str, Exporter]
    """By the format that `asgo export-model` takes."""
    writes_text: bool = False
    """Whether `asgo generate` works with its checkpoints."""
    commands_to_train_further: Callable[[Path], tuple[str, ...]] = field(default=lambda run: ())
    """Commands that begin a new run with the model of a finished one; none where that cannot be done."""
