"""The classifiers of torchvision, by name."""

from __future__ import annotations

import difflib

import torch
import torchvision
from torch import nn


def classifier_names() -> list[str]:
    """Return the names that `build_classifier` accepts."""
    return list(torchvision.models.list_models(module=torchvision.models))


def build_classifier(name: str, classes: int) -> nn.Module:
    """Build a classifier with initial weights: images (batch, 3, height, width) → logits (batch, classes).

    Raises `ValueError` for a name that torchvision does not have.
    """
    known = classifier_names()
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else "see torchvision.models"
        raise ValueError(f"unknown classifier {name!r}; {hint}")
    # By default, GoogLeNet and Inception return auxiliary logits too.
    extra = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=classes, **extra)
    return model


def why_refused(name: str, classes: int, batch_size: int, resolution: int) -> str | None:
    """Return torch's error for a training batch (batch_size, 3, resolution, resolution), or None if there is none.

    Runs on the meta device, without memory or arithmetic. For example, batch normalization raises for a single value.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.no_grad():
        model = build_classifier(name, classes)
        try:
            model(torch.empty(batch_size, 3, resolution, resolution))
        except (RuntimeError, ValueError, AssertionError) as error:
            return " ".join(str(error).split()) or type(error).__name__
    return None
