"""Names for `--help` and for the shell to complete. Other registries cannot be imported here: they import torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pipelines.optimizers import OPTIMIZER_NAMES, OWN_NAMES
from pipelines.tasks import TASKS

OPTIMIZERS, OWN_OPTIMIZERS = OPTIMIZER_NAMES, OWN_NAMES
PRESETS = {name: task.presets for name, task in TASKS.items()}
"""By task, the default first."""
SWEEPS = ("asro-gpt-paper", "asro-imagenet-paper", "asgo-gpt2-paper", "asgo-nanogpt-paper", "asgo-nanogpt-search")
TRACKERS = ("tensorboard", "wandb")
CLASSIFIERS = (
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
"""The usual ones of the many that torchvision has."""


def completing(names: Sequence[str]) -> Callable[[], list[str]]:
    """What Typer is given to complete a value; it keeps those that begin as typed."""
    return lambda: list(names)


def sweeps_and_files(incomplete: str) -> list[str]:
    """The shipped sweeps, and the TOML files of the folder that is being typed; the shell itself completes folders."""
    typed = Path(incomplete)
    folder = typed if incomplete.endswith("/") else typed.parent
    files = sorted(str(path) for path in folder.glob("*.toml"))
    return [name for name in (*SWEEPS, *files) if name.startswith(incomplete)]
