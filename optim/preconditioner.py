"""The averaged Gram matrices that ASGO and Shampoo precondition with, and their inverse roots.

A float32 cannot hold the squares of gradients above 1e19 or below 1e-19. Each factor is therefore kept divided by the
square of a scale of its own, a power of two near the largest gradient, so that dividing by it costs no digit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import State
from .matrix_functions import largest

_RATIO_LIMIT = 2.0**63
"""Bounds the ratio of two scales, whose square must be finite; a larger one only ever meets a factor of zeros."""

_RIDGE_LIMIT = 1e30


@dataclass(frozen=True, eq=False)
class Factor:
    """One averaged Gram matrix: the state that holds it, its name there, the suffix of its block, the parameter."""

    state: State
    name: str
    suffix: str
    param_name: str

    @property
    def key(self) -> str:
        """Where the state has the factor, divided by the square of its scale."""
        return f"{self.name}{self.suffix}"

    @property
    def scale_key(self) -> str:
        """Where the state has the scale."""
        return f"{self.name}_scale{self.suffix}"

    @property
    def root_key(self) -> str:
        """Where the state keeps the inverse root between the steps that refresh it."""
        return f"{self.name}_root{self.suffix}"


def zero_factor(key: str, side: int, like: Tensor) -> State:
    """The state of a factor before its first step, on the device of `like` and in its precision."""
    return {key: like.new_zeros(side, side), f"{key}_scale": like.new_zeros(())}


def move_factors(factors: Sequence[Factor], matrices: Tensor, weight: float) -> None:
    """Move each factor `A` to `lerp(A, X Xᵀ, weight)`, with `matrices` the stack of all `X`, shape (k, p, q)."""
    old = [factor.state[factor.key] for factor in factors]
    old_scales = [factor.state[factor.scale_key] for factor in factors]
    stack, scales = torch.stack(old), torch.stack(old_scales)[:, None, None]
    size = scales * stack.diagonal(dim1=-2, dim2=-1).amax(-1)[:, None, None].sqrt()
    # A factor's norm can be above the largest float32, though no gradient is.
    limit = torch.finfo(size.dtype).max
    new_scales = _power_of_two(torch.maximum(size, largest(matrices)).clamp_max(limit))
    ratio = (scales / new_scales).clamp_max(_RATIO_LIMIT)
    scaled = matrices / new_scales
    moved = torch.baddbmm(stack * ratio * ratio, scaled, scaled.mT, beta=1 - weight, alpha=weight)
    torch._foreach_copy_(old, list(moved))
    torch._foreach_copy_(old_scales, list(new_scales.flatten()))


def inverse_roots(
    factors: Sequence[Factor], compute: Callable[[Tensor, Tensor, list[str]], Tensor], eps: float
) -> dict[Factor, Tensor]:
    """The inverse root of each factor, all of one size at once, without the factor's scale: no update depends on it.

    `compute` gets a stack of factors (k, p, p), `eps` in their scales (k, 1, 1), and the parameters' names.
    """
    roots: dict[Factor, Tensor] = {}
    for alike in _of_one_size(factors):
        scales = torch.stack([factor.state[factor.scale_key] for factor in alike])[:, None, None]
        ridges = (eps / scales / scales).clamp_max(_RIDGE_LIMIT)
        stack = torch.stack([factor.state[factor.key] for factor in alike])
        roots.update(zip(alike, compute(stack, ridges, [factor.param_name for factor in alike]), strict=True))
    return roots


def _of_one_size(factors: Sequence[Factor]) -> list[list[Factor]]:
    alike: dict[object, list[Factor]] = defaultdict(list)
    for factor in factors:
        matrix = factor.state[factor.key]
        alike[matrix.shape, matrix.dtype, matrix.device].append(factor)
    return list(alike.values())


def _power_of_two(values: Tensor) -> Tensor:
    """The largest power of two up to each value, at least the smallest normal number: its exponent's bits alone."""
    values = values.clamp_min(torch.finfo(values.dtype).tiny)
    if values.dtype is torch.float64:
        return values.view(torch.int64).bitwise_and(0x7FF0000000000000).view(torch.float64)
    return values.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
