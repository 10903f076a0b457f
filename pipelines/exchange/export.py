"""Export a trained model for other libraries."""

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
    """Result of an export."""

    checkpoint: Path
    averaged: bool
    """Whether the weights are the moving average, which was validated."""
    skipped: list[str]
    """One line for each newer checkpoint that is damaged."""
    usage: str
    """Command that loads the model."""


def export_model(path: Path, form: Format, out: Path) -> Exported:
    """Write the model of a checkpoint, or of a run's newest valid one, as the folder `out`, atomically.

    Raises:
        UsageError: `out` is not empty, or the format does not support the model.
        AsgoError: there is no valid checkpoint, or writing fails.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out}: already exists; choose another --out")
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
    """Write the files into `folder`; returns a command that loads them from `out`, its final path."""
    task = task_of(config)
    if form not in task.exporters:
        formats = " or ".join(f"--format {name}" for name in task.exporters)
        raise UsageError(f"{checkpoint.folder}: --format {form} does not support {task.model}; use {formats}")
    return task.exporters[form](checkpoint, config, folder, out)
