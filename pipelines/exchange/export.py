"""A trained model as other libraries read it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelines.config import GPTRunConfig, ImageNetRunConfig, RunConfig
from pipelines.errors import AsgoError, UsageError
from pipelines.exchange.gpt2_export import write_gpt2
from pipelines.storage import staged_folder
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
    match config, form:
        case GPTRunConfig(), "hf":
            return write_gpt2(checkpoint, config, folder, out)
        case ImageNetRunConfig(), "torchvision":
            from pipelines.exchange.classifier_export import write_classifier  # takes a second to import

            return write_classifier(checkpoint, config, folder, out)
        case GPTRunConfig(), _:
            raise UsageError(f"{checkpoint.folder}: of a GPT, which torchvision does not have; take --format hf")
        case _:
            raise UsageError(f"{checkpoint.folder}: of a classifier of torchvision; take --format torchvision")
