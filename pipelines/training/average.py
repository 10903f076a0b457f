"""The exponential moving average of a model's weights, which validates in their place."""

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
    """`average ← decay · average + (1 − decay) · weight` after every step; buffers that count are only copied."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Begin with the weights and buffers as they are."""
        self._model = model
        self._weights = {name: tensor.detach() for name, tensor in model_tensors(model).items()}
        self.tensors: Tensors = {name: tensor.clone() for name, tensor in self._weights.items()}
        self._move = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights in."""
        real = [name for name, tensor in self._weights.items() if tensor.is_floating_point()]
        averages = [local(self.tensors[name]) for name in real]
        self._move(averages, [local(self._weights[name]) for name in real], None)
        for name in self._weights.keys() - set(real):
            self.tensors[name].copy_(self._weights[name])

    @contextlib.contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Inside, the model computes with the average; afterwards with its weights again, bit for bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, weight in self._weights.items():
            mine, its = local(self.tensors[name]), local(weight)
            before = its.clone()
            its.copy_(mine)
            mine.copy_(before)
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # lest it keep what it gathered of the tensors before
