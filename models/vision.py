"""Image classifiers by name: those of torchvision, and our own for small images."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torchvision
from torch import nn

from models.mlp import MLP
from models.resnet9 import ResNet9
from models.resnet20 import ResNet20
from models.vit import ViT

OWN_CLASSIFIERS: Mapping[str, Callable[..., nn.Module]] = {
    "mlp": MLP,
    "resnet9": ResNet9,
    "resnet20": ResNet20,
    "vit_tiny": ViT,
}
"""Classes by name; called with the numbers of classes, channels and pixels, and with sizes by keyword."""


def classifier_names() -> list[str]:
    """Return the names that `build_classifier` accepts."""
    return [*OWN_CLASSIFIERS, *torchvision.models.list_models(module=torchvision.models)]


def build_classifier(
    name: str, classes: int, channels: int = 3, resolution: int = 224, sizes: Mapping[str, Any] | None = None
) -> nn.Module:
    """Build a classifier with initial weights: images (batch, channels, height, width) → logits (batch, classes).

    `resolution` (height and width) and `sizes` are for our own models; torchvision's take three channels, see
    `takes_channels`. Raises `ValueError` for an unknown name, and for sizes that do not fit.
    """
    if name in OWN_CLASSIFIERS:
        return OWN_CLASSIFIERS[name](classes, channels, resolution, **(sizes or {}))
    known = classifier_names()
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else "see torchvision.models"
        raise ValueError(f"name: unknown classifier {name!r}; {hint}")
    # By default, GoogLeNet and Inception return auxiliary logits too.
    extra = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=classes, **extra)
    return model


def takes_channels(name: str, channels: int) -> int:
    """Return the channels that a classifier takes of images with `channels`: torchvision's always take three."""
    return channels if name in OWN_CLASSIFIERS else 3


def why_refused(
    name: str, classes: int, batch_size: int, resolution: int, channels: int = 3, sizes: Mapping[str, Any] | None = None
) -> str | None:
    """Return torch's error for a training batch of this size, or None if there is none.

    Runs on the meta device, without memory or arithmetic. For example, batch normalization raises for a single value.
    Raises as `build_classifier` does.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.no_grad():
        model = build_classifier(name, classes, channels, resolution, sizes)
        try:
            model(torch.empty(batch_size, channels, resolution, resolution))
        except (RuntimeError, ValueError, AssertionError) as error:
            return " ".join(str(error).split()) or type(error).__name__
    return None
