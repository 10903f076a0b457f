"""The classifiers of torchvision, by name."""

from __future__ import annotations

import difflib

import torch
import torchvision
from torch import nn


def classifier_names() -> list[str]:
    """What `build_classifier` can build."""
    return list(torchvision.models.list_models(module=torchvision.models))


def build_classifier(name: str, classes: int) -> nn.Module:
    """A freshly initialized classifier: images (batch, 3, height, width) to logits (batch, classes).

    Raises `ValueError` for a name that torchvision does not have.
    """
    known = classifier_names()
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else "see torchvision.models"
        raise ValueError(f"unknown classifier {name!r}; {hint}")
    # GoogLeNet and Inception add the outputs of other layers to theirs unless told not to.
    extra = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=classes, **extra)
    return model


def why_refused(name: str, classes: int, batch_size: int, resolution: int) -> str | None:
    """Why a classifier cannot train on batches of (batch_size, 3, resolution, resolution), in torch's words; else None.

    It is tried without memory or arithmetic, on the meta device. Batch normalization, for one, refuses one value alone.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.no_grad():
        model = build_classifier(name, classes)
        try:
            model(torch.empty(batch_size, 3, resolution, resolution))
        except (RuntimeError, ValueError, AssertionError) as error:
            return " ".join(str(error).split()) or type(error).__name__
    return None
