"""ASGO: gradients preconditioned on the smaller side of the matrix."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from optim.base import Group, State, new_step
from optim.keywords import RootMethod
from optim.matrix_functions import inverse_sqrt
from optim.matrix_optimizer import UPDATE_RMS, MatrixOptimizer, move_average, with_norm
from optim.root_cache import refreshed_roots


def asgo_update(momenta: Tensor, roots: Tensor) -> Tensor:
    """`V^{-1/2} M` on the smaller side with a root mean square of 0.2; `momenta` (k, m, n), `roots` (k, p, p)."""
    m, n = momenta.shape[-2:]
    updates = roots @ momenta if m < n else momenta @ roots
    return with_norm(updates, UPDATE_RMS * math.sqrt(m * n))


def smaller_gram(grads: Tensor) -> Tensor:
    """`G Gᵀ` where `m < n`, else `Gᵀ G`; `grads` (k, m, n) → (k, p, p) with `p = min(m, n)`."""
    return grads @ grads.mT if grads.shape[-2] < grads.shape[-1] else grads.mT @ grads


class ASGO(MatrixOptimizer):
    """Adaptive Structured Gradient Optimization: one preconditioner, on the smaller side of each matrix.

    At each step, for a gradient `G` of shape (m, n)::

        M ← lerp(M, G, 1 − momentum)
        V ← lerp(V, G Gᵀ, 1 − beta2)   if m < n, else lerp(V, Gᵀ G, 1 − beta2)
        U ← V^{-1/2} M                 if m < n, else M V^{-1/2}
        U ← U · 0.2 √(m n) / ‖U‖_F
        W ← (1 − lr · weight_decay) W − lr · U

    Source: An, Liu, Pan, Ren, Ma, Goldfarb and Zhang, arXiv 2503.20762, Algorithm 2. State: the momentum, and a square
    matrix of the smaller side.

    Args:
        params: parameters of two or more dimensions (later ones are flattened into columns), named or not, or groups
            of them; a group with `rule="adam"` takes any shape.
        lr: learning rate; AdamW's carry over, since an update's root mean square is 0.2.
        momentum: decay rate of the averaged gradient.
        beta2: decay rate of the preconditioner.
        eps: keeps the scale of the iterative roots above zero.
        weight_decay: decoupled weight decay, a share of `lr`.
        root_method: how the inverse square root is computed; see `optim.matrix_functions.inverse_sqrt`.
        root_steps: iterations of `polar_express` and `newton_schulz`.
        precond_frequency: steps from one inverse root to the next.

    Raises:
        ValueError: a keyword out of range, a parameter that is complex or no matrix, a sparse gradient.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        momentum: float = 0.9,
        beta2: float = 0.8,
        eps: float = 1e-10,
        weight_decay: float = 0.1,
        root_method: RootMethod = "auto",
        root_steps: int = 10,
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
                "root_method": root_method,
                "root_steps": root_steps,
                "precond_frequency": precond_frequency,
            },
        )

    def matrix_state(self, matrix: Tensor, group: Group) -> State:
        """Momentum (m, n) and preconditioner (p, p), zeros."""
        side = min(matrix.shape)
        return {
            "step": new_step(),
            "exp_avg": torch.zeros_like(matrix),
            "preconditioner": matrix.new_zeros(side, side),
        }

    def matrix_updates(self, grads: Tensor, states: list[State], names: list[str], group: Group) -> Tensor:
        """Algorithm 2 on a stack of matrices of equal shape."""

        def compute(preconditioners: Tensor, due: list[int]) -> Tensor:
            roots = inverse_sqrt(preconditioners, group["root_method"], group["root_steps"], group["eps"])
            return self.finite_or_identity(roots, [names[index] for index in due])

        momenta = move_average(states, "exp_avg", grads, 1 - group["momentum"])
        move_average(states, "preconditioner", smaller_gram(grads), 1 - group["beta2"])
        (roots,) = refreshed_roots(states, {"preconditioner": "inverse_root"}, group["precond_frequency"], compute)
        return asgo_update(momenta, roots)
