"""DASGO: the diagonal form of ASGO, one number a column."""

from __future__ import annotations

import math

from torch import Tensor
from torch.optim.optimizer import ParamsT

from optim.base import Group, State
from optim.matrix_optimizer import UPDATE_RMS, MatrixOptimizer, move_average, with_norm


def dasgo_update(momenta: Tensor, column_squares: Tensor, eps: float) -> Tensor:
    """`M / √(v + eps)` with a root mean square of 0.2; `momenta` (k, m, n), `column_squares` (k, n)."""
    m, n = momenta.shape[-2:]
    updates = momenta * (column_squares + eps).rsqrt()[:, None, :]
    return with_norm(updates, UPDATE_RMS * math.sqrt(m * n))


class DASGO(MatrixOptimizer):
    """Diagonal ASGO: a matrix's columns are scaled by the averaged squares of their gradients.

    At each step, for a gradient `G` of shape (m, n)::

        M ← lerp(M, G, 1 − momentum)
        v ← lerp(v, Σ_rows G², 1 − beta2)
        U ← M / √(v + eps);  U ← U · 0.2 √(m n) / ‖U‖_F
        W ← (1 − lr · weight_decay) W − lr · U

    Source: arXiv 2503.20762, Algorithm 4. State: the momentum, and a number a column.

    Args:
        params: parameters of two or more dimensions (later ones are flattened into columns), named or not, or groups
            of them; a group with `rule="adam"` takes any shape.
        lr: learning rate; AdamW's carry over, since an update's root mean square is 0.2.
        momentum: decay rate of the averaged gradient.
        beta2: decay rate of the column squares.
        eps: added to the column squares under the root.
        weight_decay: decoupled weight decay, a share of `lr`.

    Raises:
        ValueError: a keyword out of range, a parameter that is complex or no matrix, a sparse gradient.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        momentum: float = 0.9,
        beta2: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
        )

    def matrix_state(self, matrix: Tensor, group: Group) -> State:
        """Momentum (m, n) and column squares (n,), zeros."""
        return {
            "exp_avg": matrix.new_zeros(matrix.shape),
            "column_squares": matrix.new_zeros(matrix.shape[1]),
        }

    def matrix_updates(self, grads: Tensor, states: list[State], names: list[str], group: Group) -> Tensor:
        """Algorithm 4 on a stack of matrices of equal shape."""
        momenta = move_average(states, "exp_avg", grads, 1 - group["momentum"])
        squares = move_average(states, "column_squares", grads.square().sum(-2), 1 - group["beta2"])
        return dasgo_update(momenta, squares, group["eps"])
