"""Batch normalization synchronized over ranks, on GPUs and on CPUs, which `nn.SyncBatchNorm` does not support."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.modules.batchnorm import _BatchNorm


def synchronize_batch_norms(model: nn.Module, device: torch.device) -> nn.Module:
    """Synchronize every batch normalization of a model. All ranks must have batches of equal size.

    Names and values of parameters and buffers do not change.
    """
    if device.type == "cuda":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        return converted
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.__class__ = SynchronizedBatchNorm  # keeps parameters, buffers and hooks
    return model


class SynchronizedBatchNorm(_BatchNorm):
    """Like `nn.SyncBatchNorm`, with two all-reduces: of the mean, and of the squared deviations from it."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `x`, shape (batch, channels, ...); returns the same shape."""
        if not self.training:
            return super().forward(x)
        over = [dim for dim in range(x.ndim) if dim != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        mean = _mean_over_ranks(x.mean(over))
        centered = x - mean.view(shape)
        variance = _mean_over_ranks(centered.square().mean(over))
        self._update_statistics(mean, variance, dist.get_world_size() * x.numel() // x.shape[1])
        normalized = centered * torch.rsqrt(variance + self.eps).view(shape)
        if not self.affine:
            return normalized
        return normalized * self.weight.view(shape) + self.bias.view(shape)

    @torch.no_grad()
    def _update_statistics(self, mean: Tensor, variance: Tensor, count: int) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        weight = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, weight)
        self.running_var.lerp_(variance * (count / (count - 1)), weight)

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept any input of two or more dimensions."""


class _Mean(torch.autograd.Function):
    """Mean over ranks. Its gradient is the mean of the ranks' gradients."""

    @staticmethod
    def forward(ctx: FunctionCtx, values: Tensor) -> Tensor:
        return _reduced(values)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> Any:
        return _reduced(grads[0])


def _reduced(values: Tensor) -> Tensor:
    total = values.clone()
    dist.all_reduce(total)
    return total.div_(dist.get_world_size())


def _mean_over_ranks(values: Tensor) -> Tensor:
    mean: Tensor = _Mean.apply(values)
    return mean
