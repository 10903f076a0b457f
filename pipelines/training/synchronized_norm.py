"""Batch normalization synchronized over ranks, on GPUs and on CPUs.

`nn.SyncBatchNorm` does not support CPUs. On a GPU, each of its layers waits for the device, because ranks may have
batches of unequal size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def synchronize_batch_norms(model: nn.Module) -> None:
    """Synchronize every batch normalization of a model, in place. All ranks must have batches of equal size.

    Names and values of parameters and buffers do not change.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.__class__ = SynchronizedBatchNorm  # keeps parameters, buffers and hooks


class SynchronizedBatchNorm(_BatchNorm):
    """Like `nn.SyncBatchNorm`, with one collective in the forward pass and one in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `x`, shape (batch, channels, ...); returns the same shape and dtype."""
        if not self.training:
            return super().forward(x)
        normalized: Tensor
        normalized, mean, variance = _normalize(x, self.weight, self.bias, self.eps)
        self._update_statistics(mean, variance, dist.get_world_size() * x.numel() // x.shape[1])
        return normalized

    @torch.no_grad()
    def _update_statistics(self, mean: Tensor, variance: Tensor, count: int) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        weight = self.num_batches_tracked.to(mean.dtype).reciprocal() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, weight)
        self.running_var.lerp_(variance * (count / (count - 1)), weight)

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept any input of two or more dimensions."""


# DDP cannot split a graph with an autograd function of its own into its buckets.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the normalized `x`, and mean and variance over all ranks, (channels,), in float32 or wider."""
    normalized: tuple[Tensor, Tensor, Tensor] = _Normalization.apply(x, weight, bias, eps)
    return normalized


class _Normalization(torch.autograd.Function):
    """Keeps `x` for the backward pass, and nothing else of its size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
        over, shape = _layout(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        local_mean = x.mean(over, dtype=wide)
        local_variance = (x - local_mean.view(shape)).square().mean(over)
        # Not the mean of the squares less the square of the mean, which cancels.
        means, variances = _gathered(torch.stack([local_mean, local_variance])).unbind(1)
        mean = means.mean(0)
        variance = variances.mean(0) + (means - mean).square().mean(0)
        inverse = torch.rsqrt(variance + eps)
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.mark_non_differentiable(mean, variance)
        normalized = (x - mean.view(shape)) * (inverse if weight is None else inverse * weight).view(shape)
        return (normalized if bias is None else normalized + bias.view(shape)).to(x.dtype), mean, variance

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse = ctx.saved_tensors
        grad, (over, shape) = grads[0], _layout(x)
        centered = x - mean.view(shape)
        grad_bias = grad.sum(over, dtype=mean.dtype)
        grad_weight = (grad * centered).sum(over) * inverse
        of_all = torch.stack([grad_bias, grad_weight])
        dist.all_reduce(of_all)
        mean_grad, mean_product = of_all / (dist.get_world_size() * x.numel() // x.shape[1])
        along = centered * (inverse * mean_product).view(shape)
        scale = inverse if weight is None else inverse * weight
        grad_x = (grad - mean_grad.view(shape) - along) * scale.view(shape)
        # DDP averages those of the parameters over ranks.
        of_params = (None, None) if weight is None else (grad_weight.to(weight.dtype), grad_bias.to(weight.dtype))
        return grad_x.to(x.dtype), *of_params, None


def _layout(x: Tensor) -> tuple[list[int], list[int]]:
    """Return all dimensions but that of the channels, and the shape of a value for each channel."""
    return [dim for dim in range(x.ndim) if dim != 1], [1, -1] + [1] * (x.ndim - 2)


def _gathered(values: Tensor) -> Tensor:
    """Return the values of all ranks, (ranks, *shape)."""
    gathered = values.new_empty(dist.get_world_size(), *values.shape)
    dist.all_gather(list(gathered), values)
    return gathered
