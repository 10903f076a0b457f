"""Optimizers by name, and one optimizer for a whole model."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from optim.accasro import AccAsro
from optim.asgo import ASGO
from optim.asro import Asro
from optim.dasgo import DASGO
from optim.groups import decay_groups, matrix_groups
from optim.keywords import unknown_name
from optim.matrix_optimizer import MatrixOptimizer
from optim.muon import Muon
from optim.shampoo import Shampoo

_CLASSES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "asgo": (ASGO, {}),
    "dasgo": (DASGO, {}),
    "muon": (Muon, {}),
    "shampoo": (Shampoo, {}),
    "asro": (Asro, {}),
    "accasro": (AccAsro, {}),
    "adam": (torch.optim.Adam, {"fused": True}),
    "adamw": (torch.optim.AdamW, {"fused": True}),
    "amsgrad": (torch.optim.Adam, {"fused": True, "amsgrad": True}),
    "radam": (torch.optim.RAdam, {}),
    "rmsprop": (torch.optim.RMSprop, {}),
    "adagrad": (torch.optim.Adagrad, {}),
    "sgd-momentum": (torch.optim.SGD, {"fused": True, "momentum": 0.9}),
    "sgd-nesterov": (torch.optim.SGD, {"fused": True, "momentum": 0.9, "nesterov": True}),
}

OPTIMIZER_NAMES: tuple[str, ...] = tuple(_CLASSES)


def optimizer_class(name: str) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The class behind a name and the keywords that belong to the name; `ValueError` for an unknown one."""
    if name not in _CLASSES:
        raise unknown_name("optimizer", name, OPTIMIZER_NAMES)
    return _CLASSES[name]


def build_optimizer(model: nn.Module, name: str, total_steps: int, **settings: Any) -> torch.optim.Optimizer:
    """One optimizer for all trainable parameters of a model, each under the rule that fits it.

    Matrix optimizers (`asgo`, `dasgo`, `muon`, `shampoo`) take the hidden weight matrices and leave the rest to Adam
    (see `optim.groups.matrix_groups`). All others take every parameter, with weight decay on those of two or more
    dimensions.

    Args:
        model: any module; parameters that need no gradient are left out.
        name: one of `OPTIMIZER_NAMES`.
        total_steps: steps of the whole training; read by `accasro` alone.
        settings: keywords of the optimizer's constructor.

    Raises:
        ValueError: an unknown name, or a keyword that the optimizer does not have or that is out of range.
    """
    cls, fixed = optimizer_class(name)
    keywords = {**fixed, **settings}
    accepted = inspect.signature(cls).parameters
    for key in keywords:
        if key not in accepted:
            raise unknown_name(f"keyword of {name}", key, [key for key in accepted if key != "params"])
    if "total_steps" in accepted:
        keywords["total_steps"] = total_steps
    groups = matrix_groups(model) if issubclass(cls, MatrixOptimizer) else decay_groups(model)
    return cls(groups, **keywords)
