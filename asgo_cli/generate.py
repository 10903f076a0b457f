"""`asgo generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from asgo_cli import console
from asgo_cli.help_text import examples
from asgo_cli.options import LARGEST_SEED, Device

EXAMPLES = examples(
    "asgo generate runs/tiny-accasro-s42 --prompt 'def '",
    "asgo generate runs/tiny-accasro-s42 --prompt 'def ' --temperature 0",
)


def generate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint, or a run: its newest checkpoint.")],
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="Text to continue.")] = "",
    tokens: Annotated[int, typer.Option(min=1, metavar="N", help="How many tokens to add.")] = 200,
    temperature: Annotated[
        float,
        typer.Option(min=0, metavar="X", help="Below 1: less random; above 1: more random; 0: the likeliest token."),
    ] = 0.8,
    top_k: Annotated[
        int | None,
        typer.Option(min=1, metavar="K", help="Draw from the K likeliest tokens only.", show_default="from all"),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, metavar="N", help="The same seed gives the same text.")
    ] = 0,
    device: Device = None,
) -> None:
    """Continue a prompt with a trained GPT.

    Prints the text on stdout. Needs only the checkpoint.
    """
    from pipelines import generation
    from pipelines.config import RuntimeSettings

    text = generation.generate(
        checkpoint,
        prompt,
        new_tokens=tokens,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        runtime=RuntimeSettings(device=device or "auto"),
        note=console.warn,
    )
    typer.echo(text)
