"""Names for `--help` and shell completion. Other registries cannot be imported here: they import torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pipelines.optimizers import OPTIMIZER_NAMES, OWN_NAMES

OPTIMIZERS, OWN_OPTIMIZERS = OPTIMIZER_NAMES, OWN_NAMES
SWEEPS = (
    "asro-gpt-paper",
    "asro-imagenet-paper",
    "asgo-gpt2-paper",
    "asgo-nanogpt-paper",
    "asgo-nanogpt-search",
    "track3-small",
)
TRACKERS = ("tensorboard", "wandb")
OWN_CLASSIFIERS = ("mlp", "resnet9", "resnet20", "vit_tiny")
CLASSIFIERS = (
    *OWN_CLASSIFIERS,
    "efficientnet_b0",
    "efficientnet_b1",
    "efficientnet_v2_s",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "convnext_tiny",
    "mobilenet_v3_large",
    "swin_t",
    "vit_b_16",
)
"""Our own and common classifiers of torchvision, for completion; the option takes any."""


def completing(names: Sequence[str]) -> Callable[[], list[str]]:
    """Return Typer's callback to complete a value; Typer filters the names by what is typed."""
    return lambda: list(names)


def sweeps_and_files(incomplete: str) -> list[str]:
    """Return completions: shipped sweeps, and TOML files in the typed folder. The shell itself completes folders."""
    typed = Path(incomplete)
    folder = typed if incomplete.endswith("/") else typed.parent
    files = sorted(str(path) for path in folder.glob("*.toml"))
    return [name for name in (*SWEEPS, *files) if name.startswith(incomplete)]
