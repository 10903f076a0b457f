"""Base class of the optimizers that precondition a matrix with inverse roots of averaged Gram matrices (ASGO, Shampoo).

A factor is an averaged Gram matrix `G Gᵀ` or `Gᵀ G`, kept in the state. A root is the inverse root of a factor: the
preconditioner that multiplies the momentum. For checkpoints, the state key of ASGO's factor stays `preconditioner`.

The squares of gradients above 1e19 or below 1e-19 leave the range of float32. So each factor is stored divided by the
square of a scale of its own: a power of two near the largest gradient, because division by it is exact.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Group, State, describe, new_step, on_host
from .blocks import Block, Stack
from .matrix_functions import full_float32_products, largest
from .matrix_optimizer import MatrixOptimizer

_RATIO_LIMIT = 2.0**63
"""Limit of the ratio of two scales, whose square must be finite. A larger ratio only occurs for a factor of zeros."""

_RIDGE_LIMIT = 1e30


@dataclass(frozen=True, eq=False)
class Factor:
    """One averaged Gram matrix: its state, its name there, the suffix of its block, the parameter's name."""

    state: State
    name: str
    suffix: str
    param_name: str

    @property
    def key(self) -> str:
        """State key of the factor, divided by the square of its scale."""
        return f"{self.name}{self.suffix}"

    @property
    def scale_key(self) -> str:
        """State key of the scale."""
        return f"{self.name}_scale{self.suffix}"

    @property
    def root_key(self) -> str:
        """State key of the inverse root, which is kept if `precond_frequency` is above 1."""
        return f"{self.name}_root{self.suffix}"


class PreconditionedOptimizer(MatrixOptimizer):
    """Base class: a subclass sets `factors`, and implements `inverse_root` and `updates`."""

    factors: tuple[str, ...]
    """State keys of the factor of the shorter side and, if any, of the longer side."""
    side_limit: float = math.inf
    """Sides above this limit have no factor, and are not preconditioned."""

    def inverse_root(self, factors: Tensor, ridges: Tensor, group: Group) -> Tensor:
        """Return inverse roots of factors (k, p, p), up to a positive multiple; `ridges` (k, 1, 1): scaled `eps`.

        The roots have shape (k, p, p), or (k, n, p, p) for n matrices that `updates` combines.
        """
        raise AssertionError("a subclass implements this")

    def updates(
        self, stack: Stack, grads: dict[Tensor, Tensor], momenta: Tensor, roots: dict[str, Tensor], group: Group
    ) -> Tensor:
        """Return the updates `U` of a stack, shape (k, p, q) as `momenta`; `roots`: stacked roots by factor."""
        raise AssertionError("a subclass implements this")

    def param_state(self, param: Tensor, group: Group) -> State:
        """Return the step count."""
        return {"step": new_step(self.step_device(group, param))}

    def block_state(self, shape: tuple[int, int], like: Tensor) -> State:
        """Return factors of zeros."""
        state: State = {}
        for key, side in self.sides(shape):
            state.update(zero_factor(key, side, like))
        return state

    def sides(self, shape: tuple[int, int]) -> list[tuple[str, int]]:
        """Return the factors of a matrix, each with its size."""
        sides = zip(self.factors, sorted(shape), strict=False)
        return [(key, side) for key, side in sides if side <= self.side_limit]

    def update_matrices(self, params: list[Tensor], group: Group) -> None:
        """Update all factors, recompute the roots that are due, batched by size, and update the weights.

        TF32 is disabled: its error, 5e-4 of the large gradient directions, leaks into the small ones, and a root with
        condition number 1e2 amplifies it to 5e-2 of the update.
        """
        with full_float32_products():
            self._update_matrices(params, group)

    def _update_matrices(self, params: list[Tensor], group: Group) -> None:
        grads, momenta = self.moved_momenta(params, group)
        torch._foreach_add_([self.state[param]["step"] for param in params], 1.0)
        stacks = self.stacks(params, group)
        factors = self._moved_factors(stacks, grads, group)
        roots = self._roots([factor for sides in factors for side in sides.values() for factor in side], group)
        for stack, sides in zip(stacks, factors, strict=True):
            side_roots = {key: torch.stack([roots[factor] for factor in side]) for key, side in sides.items()}
            updates = self.updates(stack, grads, stack.of(momenta), side_roots, group)
            stack.subtract(updates, on_host(group["lr"]), group["weight_decay"])

    def _moved_factors(
        self, stacks: list[Stack], grads: dict[Tensor, Tensor], group: Group
    ) -> list[dict[str, list[Factor]]]:
        """Update the factors with this step's gradients; returns the blocks' factors by name, for each stack."""
        names = {param: describe(group, index) for index, param in enumerate(group["params"])}

        def factor(block: Block, key: str) -> Factor:
            return Factor(self.state[block.param], key, block.suffix, names[block.param])

        factors = [
            {key: [factor(block, key) for block in stack.blocks] for key, _ in self.sides(stack.blocks[0].shape)}
            for stack in stacks
        ]
        for stack, sides in zip(stacks, factors, strict=True):
            matrices = stack.of(grads)
            for key, of_side in zip(self.factors, (matrices, matrices.mT), strict=False):
                if key in sides:
                    move_factors(sides[key], of_side, 1 - group["beta2"])
        return factors

    def _roots(self, factors: list[Factor], group: Group) -> dict[Factor, Tensor]:
        frequency = group["precond_frequency"]

        def compute(stack: Tensor, ridges: Tensor, names: list[str]) -> Tensor:
            return self.finite_or_identity(self.inverse_root(stack, ridges, group), names)

        if frequency == 1:
            return inverse_roots(factors, compute, group["eps"])
        due = [factor for factor in factors if self._is_due(factor, frequency)]
        for factor, root in inverse_roots(due, compute, group["eps"]).items():
            factor.state[factor.root_key] = root.clone()
        return {factor: factor.state[factor.root_key] for factor in factors}

    def _is_due(self, factor: Factor, frequency: int) -> bool:
        """Whether to compute the root: at steps 1, 1 + frequency, 1 + 2 frequency, ..., or if it is missing."""
        return (int(factor.state["step"]) - 1) % frequency == 0 or factor.root_key not in factor.state


def zero_factor(key: str, side: int, like: Tensor) -> State:
    """Return the state of a factor before its first step, with the device and dtype of `like`."""
    return {key: like.new_zeros(side, side), f"{key}_scale": like.new_zeros(())}


def move_factors(factors: Sequence[Factor], matrices: Tensor, weight: float) -> None:
    """Update each factor `A` to `lerp(A, X Xᵀ, weight)` in place; `matrices` are the stacked `X`, shape (k, p, q)."""
    old = [factor.state[factor.key] for factor in factors]
    old_scales = [factor.state[factor.scale_key] for factor in factors]
    stack, scales = torch.stack(old), torch.stack(old_scales)[:, None, None]
    size = scales * stack.diagonal(dim1=-2, dim2=-1).amax(-1)[:, None, None].sqrt()
    # The norm of a factor can exceed the range of float32 even if no gradient does.
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
    """Return the inverse root of each factor, batched by size. The factor's scale is left out: updates are normalized.

    `compute` takes factors (k, p, p), the scaled `eps` (k, 1, 1), and the names of the parameters.
    """
    roots: dict[Factor, Tensor] = {}
    for alike in _of_one_size(factors):
        scales = torch.stack([factor.state[factor.scale_key] for factor in alike])[:, None, None]
        # Two divisions, because the square of a scale can underflow.
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
    """Round down to a power of two, by masking all bits but the exponent; at least the smallest normal number."""
    values = values.clamp_min(torch.finfo(values.dtype).tiny)
    if values.dtype is torch.float64:
        return values.view(torch.int64).bitwise_and(0x7FF0000000000000).view(torch.float64)
    return values.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
