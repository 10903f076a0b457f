"""Cross-entropy that keeps no float32 copy of the logits, the largest tensor of a language model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""Target of a position without a token, as in `torch.nn.functional.cross_entropy`."""
_ELEMENTS_AT_ONCE = 2**26


def chunked_cross_entropy(logits: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
    """Return the mean cross-entropy of the targets that are not `IGNORED`, in float32; (n, classes), (n,) → ().

    Adds `z_loss` times the mean of the squared logarithm of the softmax's denominator. Equals
    `functional.cross_entropy(logits.float(), targets)` up to rounding. Computes some rows at a time, forward and
    backward, and keeps the logits as they are and one float32 number a row.
    """
    loss: Tensor = _ChunkedCrossEntropy.apply(logits, targets, z_loss)
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, z_loss: float) -> Tensor:
        normalizers = logits.new_empty(len(logits), dtype=torch.float32)
        chosen = torch.empty_like(normalizers)
        places = targets.clamp(min=0)[:, None]
        for rows in _chunks(logits):
            part = logits[rows].float()
            normalizers[rows] = part.logsumexp(1)
            chosen[rows] = part.gather(1, places[rows])[:, 0]
        counted = targets != IGNORED
        count = counted.sum()
        ctx.z_loss = z_loss
        ctx.save_for_backward(logits, places, normalizers, counted, count)
        loss = torch.where(counted, normalizers - chosen, 0).sum() / count
        return loss + z_loss * normalizers.square().mean() if z_loss else loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, places, normalizers, counted, count = ctx.saved_tensors
        of_loss = torch.where(counted, grad / count, 0)[:, None]
        of_normalizer = of_loss + (2 * ctx.z_loss / len(logits)) * grad * normalizers[:, None]
        result = torch.empty_like(logits)
        for rows in _chunks(logits):
            part = logits[rows].float().sub_(normalizers[rows, None]).exp_().mul_(of_normalizer[rows])
            result[rows] = part.scatter_add_(1, places[rows], -of_loss[rows])
        return result, None, None


def _chunks(logits: Tensor) -> Iterator[slice]:
    rows = max(1, _ELEMENTS_AT_ONCE // logits.shape[1])
    return (slice(start, start + rows) for start in range(0, len(logits), rows))
