"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

LARGEST_SEED = 2**64 - 1
"""The largest seed that torch accepts."""

Device = Annotated[
    Literal["auto", "cuda", "mps", "cpu"] | None,
    typer.Option(help="Device; auto, the default, takes the best one available."),
]
