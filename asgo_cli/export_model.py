"""`asgo export-model`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from asgo_cli import console
from asgo_cli.help_text import examples

EXAMPLES = examples(
    "asgo export-model runs/asgo --format hf --out models/asgo",
    "asgo export-model runs/b1 --format torchvision --out models/b1",
)


def export_model(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CKPT", help="A checkpoint, or a run: its newest valid checkpoint.")
    ],
    form: Annotated[
        Literal["hf", "torchvision"],
        typer.Option("--format", help="hf: a GPT for Hugging Face's transformers; torchvision: an image classifier."),
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="The folder to write; it must not exist yet.")],
) -> None:
    """Export a trained model for other libraries.

    Writes a folder for transformers, with its tokenizer, or weights for torchvision: safetensors, no pickle. If the run
    averages its weights, the average is written: validation used it.
    """
    from pipelines.exchange.export import export_model

    exported = export_model(checkpoint, form, out)
    for line in exported.skipped:
        console.warn(line)
    weights = "averaged weights" if exported.averaged else "weights"
    console.say(f"{out}: the {weights} of {exported.checkpoint}")
    console.suggest_next(exported.usage)
