"""Normalizations whose gains may have another dtype than their input."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def rms_norm(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """RMS-normalize (..., d) in the dtype of the input, to which a gain (d,) is cast."""
    unit = functional.rms_norm(x, x.shape[-1:], None if gain is None else gain.to(x.dtype), eps)
    return unit.to(x.dtype)  # on a GPU, autocast returns float32


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` in the dtype of its input: a float32 gain leaves a bfloat16 residual stream as it is."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) → (..., d)."""
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` that takes a float32 input also with bfloat16 gains, as FSDP2 gathers them."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) → (..., d)."""
        gain, bias = (_at_least(x.dtype, each) for each in (self.weight, self.bias))
        return functional.layer_norm(x, self.normalized_shape, gain, bias, self.eps)


def _at_least(dtype: torch.dtype, param: Tensor | None) -> Tensor | None:
    return None if param is None else param.to(torch.promote_types(param.dtype, dtype))
