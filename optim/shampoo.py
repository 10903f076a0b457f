"""Shampoo: gradients preconditioned on both sides of the matrix, with the length of Adam's step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from optim.base import Group, State, new_step
from optim.matrix_functions import inverse_fourth_root
from optim.matrix_optimizer import MatrixOptimizer, move_average, with_norm
from optim.root_cache import refreshed_roots


def shampoo_update(momenta: Tensor, exp_avg_sqs: Tensor, left: Tensor, right: Tensor, eps: float) -> Tensor:
    """`L^{-1/4} M R^{-1/4}` with the norm of `M / √(v + eps)`; (k, m, n), (k, m, n), (k, m, m), (k, n, n)."""
    grafted_norm = torch.linalg.matrix_norm(momenta * (exp_avg_sqs + eps).rsqrt())[:, None, None]
    return with_norm(left @ momenta @ right, grafted_norm)


class Shampoo(MatrixOptimizer):
    """Two preconditioners a matrix, averaged exponentially, and Adam's step length grafted on.

    At each step, for a gradient `G` of shape (m, n)::

        M ← lerp(M, G, 1 − momentum);       v ← lerp(v, G², 1 − beta2)
        L ← lerp(L, G Gᵀ, 1 − beta2);       R ← lerp(R, Gᵀ G, 1 − beta2)
        U ← (L + eps I)^{-1/4} M (R + eps I)^{-1/4}
        U ← U · ‖M / √(v + eps)‖_F / ‖U‖_F
        W ← (1 − lr · weight_decay) W − lr · U

    Source: Gupta, Koren and Singer, arXiv 1802.09568, in the averaged form of the ASGO paper's experiments. State: the
    momentum, the squares, and a square matrix a side.

    Args:
        params: parameters of two or more dimensions (later ones are flattened into columns), named or not, or groups
            of them; a group with `rule="adam"` takes any shape.
        lr: learning rate.
        momentum: decay rate of the averaged gradient.
        beta2: decay rate of the squares and of both factors.
        eps: added to the squares and to the factors' diagonals.
        weight_decay: decoupled weight decay, a share of `lr`.
        precond_frequency: steps from one pair of inverse roots to the next.

    Raises:
        ValueError: a keyword out of range, a parameter that is complex or no matrix, a sparse gradient.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 5e-3,
        momentum: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-10,
        weight_decay: float = 0.1,
        precond_frequency: int = 1,
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
            },
        )

    def matrix_state(self, matrix: Tensor, group: Group) -> State:
        """Momentum and squares (m, n), left factor (m, m) and right factor (n, n), zeros."""
        m, n = matrix.shape
        return {
            "step": new_step(),
            "exp_avg": torch.zeros_like(matrix),
            "exp_avg_sq": torch.zeros_like(matrix),
            "left_factor": matrix.new_zeros(m, m),
            "right_factor": matrix.new_zeros(n, n),
        }

    def matrix_updates(self, grads: Tensor, states: list[State], names: list[str], group: Group) -> Tensor:
        """Both factors and their roots on a stack of matrices of equal shape."""

        def compute(factors: Tensor, due: list[int]) -> Tensor:
            roots = inverse_fourth_root(factors, group["eps"])
            return self.finite_or_identity(roots, [names[index] for index in due])

        momenta = move_average(states, "exp_avg", grads, 1 - group["momentum"])
        exp_avg_sqs = move_average(states, "exp_avg_sq", grads.square(), 1 - group["beta2"])
        move_average(states, "left_factor", grads @ grads.mT, 1 - group["beta2"])
        move_average(states, "right_factor", grads.mT @ grads, 1 - group["beta2"])
        left, right = refreshed_roots(
            states,
            {"left_factor": "left_root", "right_factor": "right_root"},
            group["precond_frequency"],
            compute,
        )
        return shampoo_update(momenta, exp_avg_sqs, left, right, group["eps"])
