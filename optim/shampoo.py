"""Shampoo: precondition gradients on both sides of the matrix, with the norm of Adam's step."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .base import Group, State, describe, state_dtype
from .blocks import Stack, block_sizes
from .matrix_functions import damped_inverse_root, frobenius_norm, scaled_to_one
from .matrix_optimizer import with_norm
from .preconditioned import PreconditionedOptimizer

SIDE_LIMIT = 10_000
"""The longest side that is preconditioned. A factor of this side takes 0.4 GB, and minutes to decompose."""


def shampoo_update(momenta: Tensor, rms: Tensor, left: Tensor | None, right: Tensor | None, eps: float) -> Tensor:
    """Return `L^exponent M R^exponent`, shape (k, p, q), scaled to the norm of `M / √(v + eps)`.

    `momenta` and `rms = √v` have shape (k, p, q). `left` (k, p, p) and `right` (k, q, q) are the inverse roots; None
    means that the side is not preconditioned.
    """
    grafted_norm = frobenius_norm(momenta / torch.hypot(rms, rms.new_full((), eps**0.5)))
    updates = scaled_to_one(momenta)
    updates = updates if left is None else left @ updates
    return with_norm(updates if right is None else updates @ right, grafted_norm)


class Shampoo(PreconditionedOptimizer):
    """Two preconditioners per matrix, exponentially averaged, with Adam's step norm (grafting).

    At each step, for a gradient `G` of shape (m, n)::

        M ← lerp(M, G, 1 − momentum);       v ← lerp(v, G², 1 − beta2)
        L ← lerp(L, G Gᵀ, 1 − beta2);       R ← lerp(R, Gᵀ G, 1 − beta2)
        U ← (L + eps I)^exponent M (R + eps I)^exponent
        U ← U · ‖M / √(v + eps)‖_F / ‖U‖_F
        W ← (1 − lr · weight_decay) W − lr · U

    Source: Gupta, Koren and Singer, arXiv 1802.09568, in the averaged form of the ASGO paper's experiments. State: the
    momentum, `√v`, and one square matrix per side. A side above `SIDE_LIMIT` is not preconditioned.

    Args:
        params: parameters with at least two dimensions (flattened to two), named or not, or parameter groups; groups
            with `rule="adam"` accept any shape.
        lr: learning rate.
        momentum: decay rate of the averaged gradient.
        beta2: decay rate of the squares and of both factors.
        eps: added to the squares and to the factors' diagonals.
        weight_decay: decoupled weight decay, multiplied by `lr`.
        precond_frequency: number of steps between two computations of the inverse roots.
        exponent: power of both factors, -1/4 in the paper; -1/3 and -1/2 are used too. On a GPU, `-1 / exponent` should
            be a whole number: other roots are slow.
        maximize: maximize the objective instead of minimizing it.
        capturable: count steps on the parameter's device, for use in a CUDA graph.

    Raises:
        ValueError: invalid keyword value, complex parameter, parameter that is not a matrix, or sparse gradient.
    """

    factors = ("short_factor", "long_factor")
    side_limit = SIDE_LIMIT

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 5e-3,
        momentum: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-10,
        weight_decay: float = 0.1,
        precond_frequency: int = 1,
        exponent: float = -0.25,
        *,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "beta2": beta2,
                "eps": eps,
                "weight_decay": weight_decay,
                "precond_frequency": precond_frequency,
                "exponent": exponent,
                "maximize": maximize,
                "capturable": capturable,
            },
        )

    def check_param(self, group: Group, index: int, param: Tensor) -> None:
        """Check the parameter, and warn if a side is too long to be preconditioned."""
        super().check_param(group, index, param)
        if group["rule"] == "adam":
            return
        rows, *others = param.shape[group["batch_dims"] :]
        side = max(math.prod(others), *block_sizes(rows, group["row_blocks"]))
        if side > self.side_limit:
            warnings.warn(
                f"Shampoo does not precondition the side of {side} of {describe(group, index)}: the limit is "
                f"{self.side_limit}; to use Adam instead, put the parameter in a group with rule='adam'",
                stacklevel=2,
            )

    def param_state(self, param: Tensor, group: Group) -> State:
        """Return the step count and `√v`: `v` itself could leave the range of float32."""
        return {**super().param_state(param, group), "exp_avg_rms": torch.zeros_like(param, dtype=state_dtype(param))}

    def inverse_root(self, factors: Tensor, ridges: Tensor, group: Group) -> Tensor:
        """Return `(A + eps I)^exponent` of each factor `A`."""
        return damped_inverse_root(factors, -1 / group["exponent"], ridges)

    def updates(
        self, stack: Stack, grads: dict[Tensor, Tensor], momenta: Tensor, roots: dict[str, Tensor], group: Group
    ) -> Tensor:
        """Return `U` for a stack of matrices, transposed so that `p ≤ q`."""
        state = {param: self.state[param]["exp_avg_rms"] for param in grads}
        beta2 = group["beta2"]
        # `hypot`, because the squares of tiny and huge gradients leave the range of float32.
        rms = torch.hypot(stack.of(state) * beta2**0.5, stack.of(grads) * (1 - beta2) ** 0.5)
        stack.store(rms, state)
        left, right = (roots.get(key) for key in self.factors)
        return shampoo_update(momenta, rms, left, right, group["eps"])
