"""A trained model as other libraries read it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelines.config import RunConfig
from pipelines.errors import AsgoError, UsageError
from pipelines.storage import staged_folder
from pipelines.tasks import task_of
from pipelines.training.checkpoint import Checkpoint, find_checkpoint

Format = Literal["hf", "torchvision"]


@dataclass(frozen=True)
class Exported:
    """What was written, of what, and how to load it."""

    checkpoint: Path
    averaged: bool
    """Whether it is the moving average of the weights, which was validated in their place."""
    skipped: list[str]
    """A line for each newer checkpoint that is damaged."""
    usage: str
    """A command that loads it."""


def export_model(path: Path, form: Format, out: Path) -> Exported:
    """Write the model of a checkpoint, or of a run's newest good one, as the folder `out`, whole or not at all.

    Raises:
        UsageError: `out` holds something already, or the model is not of the kind that the format is for.
        AsgoError: there is no good checkpoint, or the disk refuses.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out}: exists already; choose another --out")
    checkpoint, skipped = find_checkpoint(path)
    config = checkpoint.config()
    try:
        with staged_folder(out.absolute()) as folder:
            usage = _write(checkpoint, config, form, folder, out)
    except OSError as error:
        raise AsgoError(f"{out}: could not be written: {error.strerror}") from error
    averaged = config.training.ema_decay is not None
    return Exported(checkpoint.folder, averaged, skipped, usage)


def _write(checkpoint: Checkpoint, config: RunConfig, form: Format, folder: Path, out: Path) -> str:
    """Write the files; returns a command that loads them from `out`, where they come to lie."""
    task = task_of(config)
    if form not in task.exporters:
        formats = " or ".join(f"--format {name}" for name in task.exporters)
        raise UsageError(f"{checkpoint.folder}: of {task.model}, which --format {form} does not write; take {formats}")
    return task.exporters[form](checkpoint, config, folder, out)
