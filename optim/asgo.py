"""ASGO: precondition gradients on the smaller side of the matrix."""

from __future__ import annotations

import math

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .base import Group
from .blocks import Stack
from .matrix_functions import factored_inverse_sqrt, inverse_sqrt, precondition, scaled_to_one
from .matrix_optimizer import UPDATE_RMS, with_norm
from .preconditioned import PreconditionedOptimizer
from .specs import RootMethod, RootPrecision


def asgo_update(momenta: Tensor, roots: Tensor, precision: RootPrecision = "fp32") -> Tensor:
    """Return `V^{-1/2} M` scaled to an RMS of 0.2; `momenta` (k, p, q) with `p ≤ q`.

    `roots` are `V^{-1/2}` (k, p, p), or its factors (k, 2, p, p), applied in `precision`; see `factored_inverse_sqrt`.
    """
    scaled = scaled_to_one(momenta)
    updates = precondition(roots, scaled, precision) if roots.ndim == 4 else roots @ scaled
    return with_norm(updates, UPDATE_RMS * math.sqrt(momenta[0].numel()))


class ASGO(PreconditionedOptimizer):
    """Adaptive Structured Gradient Optimization: one preconditioner, on the smaller side of each matrix.

    At each step, for a gradient `G` of shape (m, n)::

        M ← lerp(M, G, 1 − momentum)
        V ← lerp(V, G Gᵀ, 1 − beta2)   if m < n, else lerp(V, Gᵀ G, 1 − beta2)
        U ← V^{-1/2} M                 if m < n, else M V^{-1/2}
        U ← U · 0.2 √(m n) / ‖U‖_F
        W ← (1 − lr · weight_decay) W − lr · U

    Source: An, Liu, Pan, Ren, Ma, Goldfarb and Zhang, arXiv 2503.20762, Algorithm 2. State: the momentum, and `V`, a
    square matrix of the smaller side.

    Args:
        params: parameters with at least two dimensions (flattened to two), named or not, or parameter groups; groups
            with `rule="adam"` accept any shape.
        lr: learning rate; values for AdamW work, because the RMS of an update is 0.2.
        momentum: decay rate of the averaged gradient.
        beta2: decay rate of the preconditioner.
        eps: keeps the scaling of the iterative roots above zero.
        weight_decay: decoupled weight decay, multiplied by `lr`.
        root_method: algorithm for the inverse square root; see `optim.matrix_functions.inverse_sqrt`.
        root_steps: iterations of `polar_express`, `newton_schulz` and `cholesky`; 8 are enough for `cholesky`.
        precond_frequency: number of steps between two computations of the inverse root.
        root_precision: `bf16` or `fp32`, the precision of the iterations of `cholesky`; other methods ignore it.
        maximize: maximize the objective instead of minimizing it.
        capturable: count steps on the parameter's device, for use in a CUDA graph.

    Raises:
        ValueError: invalid keyword value, complex parameter, parameter that is not a matrix, or sparse gradient.
    """

    factors = ("preconditioner",)

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
        root_precision: RootPrecision = "bf16",
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
                "root_method": root_method,
                "root_steps": root_steps,
                "precond_frequency": precond_frequency,
                "root_precision": root_precision,
                "maximize": maximize,
                "capturable": capturable,
            },
        )

    def inverse_root(self, factors: Tensor, ridges: Tensor, group: Group) -> Tensor:
        """Return `V^{-1/2}`, by the `root_method` of the group; for `cholesky` its factors, unless roots are kept."""
        method, steps, precision = group["root_method"], group["root_steps"], group["root_precision"]
        if method == "cholesky" and group["precond_frequency"] == 1:
            return factored_inverse_sqrt(factors, steps, precision)
        return inverse_sqrt(factors, method, steps, ridges, precision)

    def updates(
        self, stack: Stack, grads: dict[Tensor, Tensor], momenta: Tensor, roots: dict[str, Tensor], group: Group
    ) -> Tensor:
        """Return `U` of Algorithm 2 for a stack of matrices, transposed so that `p ≤ q`."""
        return asgo_update(momenta, roots["preconditioner"], group["root_precision"])
