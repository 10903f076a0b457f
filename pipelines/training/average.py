"""Exponential moving average of a model's weights, used for validation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.optim.swa_utils import get_ema_multi_avg_fn

from optim.transport import local
from pipelines.tensors import Tensors, model_tensors


class WeightAverage:
    """`average ← decay · average + (1 − decay) · weight` after every step. Integer buffers are copied."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Begin with a copy of the weights and buffers."""
        self._model = model
        self._weights = {name: tensor.detach() for name, tensor in model_tensors(model).items()}
        self.tensors: Tensors = {name: tensor.clone() for name, tensor in self._weights.items()}
        self._update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the current weights."""
        real = [name for name, tensor in self._weights.items() if tensor.is_floating_point()]
        averages = [local(self.tensors[name]) for name in real]
        self._update(averages, [local(self._weights[name]) for name in real], None)
        for name in self._weights.keys() - set(real):
            self.tensors[name].copy_(self._weights[name])

    @contextlib.contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Context manager in which the model has the average as its weights. Restores the weights exactly."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, weight in self._weights.items():
            average, current = local(self.tensors[name]), local(weight)
            saved = current.clone()
            current.copy_(average)
            average.copy_(saved)
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # it may still hold gathered copies of the other tensors
