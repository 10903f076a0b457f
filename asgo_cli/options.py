"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

LARGEST_SEED = 2**64 - 1
"""That torch takes."""

Device = Annotated[
    Literal["auto", "cuda", "mps", "cpu"] | None,
    typer.Option(help="Where to compute; auto, the default, takes the best at hand."),
]
