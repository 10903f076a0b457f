"""The template of the optimizers that precondition a matrix by inverse roots of its gradients' Gram matrices.

A float32 cannot hold the squares of gradients above 1e19 or below 1e-19. Each factor is therefore kept divided by the
square of a scale of its own, a power of two near the largest gradient, so that dividing by it costs no digit.
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


class PreconditionedOptimizer(MatrixOptimizer):
    """Template: a subclass names its factors, and implements `inverse_root` and `updates`."""

    factors: tuple[str, ...]
    """State keys of the factor of the shorter side and, if there is one, of the longer."""
    side_limit: float = math.inf
    """A longer side has no factor, and is not preconditioned."""

    def inverse_root(self, factors: Tensor, ridges: Tensor, group: Group) -> Tensor:
        """Inverse roots of a stack of factors (k, p, p), with `eps` in their scales (k, 1, 1); each up to a factor."""
        raise AssertionError("a subclass implements this")

    def updates(
        self, stack: Stack, grads: dict[Tensor, Tensor], momenta: Tensor, roots: dict[str, Tensor], group: Group
    ) -> Tensor:
        """The updates `U` of a stack, in the shape of `momenta` (k, p, q), from a stack of roots for each factor."""
        raise AssertionError("a subclass implements this")

    def param_state(self, param: Tensor, group: Group) -> State:
        """The count of steps."""
        return {"step": new_step(self.step_device(group, param))}

    def block_state(self, shape: tuple[int, int], like: Tensor) -> State:
        """Factors, zeros."""
        state: State = {}
        for key, side in self.sides(shape):
            state.update(zero_factor(key, side, like))
        return state

    def sides(self, shape: tuple[int, int]) -> list[tuple[str, int]]:
        """The factors of a matrix, each with its size."""
        sides = zip(self.factors, sorted(shape), strict=False)
        return [(key, side) for key, side in sides if side <= self.side_limit]

    def update_matrices(self, params: list[Tensor], group: Group) -> None:
        """Move all factors, refresh the roots that are due, all of one size at once, and step.

        In true float32: TF32 would put 5e-4 of a gradient's large directions into its small ones, which a root of
        condition 1e2 makes 5e-2 of the update.
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
        """For each stack and each of its sides, the factors of the stack's blocks, moved by this step's gradients."""
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
        """At steps 1, 1 + frequency, 1 + 2 frequency, ..., and where there is no root yet."""
        return (int(factor.state["step"]) - 1) % frequency == 0 or factor.root_key not in factor.state


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
