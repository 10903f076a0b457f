"""The template of the optimizers that precondition a matrix by inverse roots of its gradients' Gram matrices."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import Group, State, describe, new_step, on_host
from .blocks import Block, Stack
from .matrix_functions import full_float32_products
from .matrix_optimizer import MatrixOptimizer
from .preconditioner import Factor, inverse_roots, move_factors, zero_factor


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
