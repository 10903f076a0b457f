"""Shampoo: gradients preconditioned on both sides of the matrix, with the length of Adam's step."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .base import Group, State, describe, state_dtype
from .blocks import Stack, block_sizes
from .matrix_functions import frobenius_norm, inverse_fourth_root, scaled_to_one
from .matrix_optimizer import with_norm
from .preconditioned import PreconditionedOptimizer

SIDE_LIMIT = 10_000
"""The longest side that is preconditioned: its factor has 0.4 GB, and takes minutes to decompose."""


def shampoo_update(momenta: Tensor, rms: Tensor, left: Tensor | None, right: Tensor | None, eps: float) -> Tensor:
    """`L^{-1/4} M R^{-1/4}` with the norm of `M / √(v + eps)`, `rms = √v`; (k, p, q) twice, (k, p, p), (k, q, q).

    `None` is a side that is not preconditioned.
    """
    grafted_norm = frobenius_norm(momenta / torch.hypot(rms, rms.new_tensor(eps**0.5)))
    updates = scaled_to_one(momenta)
    updates = updates if left is None else left @ updates
    return with_norm(updates if right is None else updates @ right, grafted_norm)


class Shampoo(PreconditionedOptimizer):
    """Two preconditioners a matrix, averaged exponentially, and Adam's step length grafted on.

    At each step, for a gradient `G` of shape (m, n)::

        M ← lerp(M, G, 1 − momentum);       v ← lerp(v, G², 1 − beta2)
        L ← lerp(L, G Gᵀ, 1 − beta2);       R ← lerp(R, Gᵀ G, 1 − beta2)
        U ← (L + eps I)^{-1/4} M (R + eps I)^{-1/4}
        U ← U · ‖M / √(v + eps)‖_F / ‖U‖_F
        W ← (1 − lr · weight_decay) W − lr · U

    Source: Gupta, Koren and Singer, arXiv 1802.09568, in the averaged form of the ASGO paper's experiments. State: the
    momentum, the squares, and a square matrix a side. A side above `SIDE_LIMIT` is not preconditioned.

    Args:
        params: parameters of two or more dimensions (later ones are flattened into columns), named or not, or groups
            of them; a group with `rule="adam"` takes any shape.
        lr: learning rate.
        momentum: decay rate of the averaged gradient.
        beta2: decay rate of the squares and of both factors.
        eps: added to the squares and to the factors' diagonals.
        weight_decay: decoupled weight decay, a share of `lr`.
        precond_frequency: steps from one pair of inverse roots to the next.
        maximize: climb the gradient instead of descending.
        capturable: count steps on the parameter's device, for a step inside a CUDA graph.

    Raises:
        ValueError: a keyword out of range, a parameter that is complex or no matrix, a sparse gradient.
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
                "maximize": maximize,
                "capturable": capturable,
            },
        )

    def check_param(self, group: Group, index: int, param: Tensor) -> None:
        """Warn of a side that is too long to be preconditioned."""
        super().check_param(group, index, param)
        if group["rule"] == "adam":
            return
        rows, *others = param.shape[group["batch_dims"] :]
        side = max(math.prod(others), *block_sizes(rows, group["row_blocks"]))
        if side > self.side_limit:
            warnings.warn(
                f"Shampoo leaves a side of {side} of {describe(group, index)} without preconditioner, since its limit "
                f"is {self.side_limit}; a parameter group with rule='adam' gives the parameter Adam",
                stacklevel=2,
            )

    def param_state(self, param: Tensor, group: Group) -> State:
        """The count of steps, and the root mean squares of the gradient, whose squares a float32 could not hold."""
        return {**super().param_state(param, group), "exp_avg_rms": torch.zeros_like(param, dtype=state_dtype(param))}

    def inverse_root(self, factors: Tensor, ridges: Tensor, group: Group) -> Tensor:
        """`(A + eps I)^{-1/4}` of a factor `A`."""
        return inverse_fourth_root(factors, ridges)

    def updates(
        self, stack: Stack, grads: dict[Tensor, Tensor], momenta: Tensor, roots: dict[str, Tensor], group: Group
    ) -> Tensor:
        """Both sides of a stack of matrices of equal shape, transposed where they are tall."""
        state = {param: self.state[param]["exp_avg_rms"] for param in grads}
        beta2 = group["beta2"]
        rms = torch.hypot(stack.of(state) * beta2**0.5, stack.of(grads) * (1 - beta2) ** 0.5)
        stack.store(rms, state)
        left, right = (roots.get(key) for key in self.factors)
        return shampoo_update(momenta, rms, left, right, group["eps"])
