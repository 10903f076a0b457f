"""Muon: orthogonalized momentum."""

from __future__ import annotations

import math

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .base import Group, on_host
from .matrix_functions import orthogonalize
from .matrix_optimizer import UPDATE_RMS, MatrixOptimizer


def muon_update(momenta: Tensor, steps: int) -> Tensor:
    """Orthogonalize momenta, shape (k, m, n), and scale them to an RMS near 0.2."""
    return UPDATE_RMS * math.sqrt(max(momenta.shape[-2:])) * orthogonalize(momenta, steps)


class Muon(MatrixOptimizer):
    """Momentum orthogonalized by Newton–Schulz, scaled to the RMS of AdamW's updates.

    At each step, for a gradient `G` of shape (m, n)::

        M ← lerp(M, G, 1 − momentum)
        U ← 0.2 √max(m, n) · orthogonalize(lerp(G, M, momentum) if nesterov else M)
        W ← (1 − lr · weight_decay) W − lr · U

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; scaling of Liu et al., arXiv
    2502.16982. Equivalent to `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`. State: the momentum.

    Args:
        params: parameters with at least two dimensions (flattened to two), named or not, or parameter groups; groups
            with `rule="adam"` accept any shape.
        lr: learning rate; values for AdamW work.
        momentum: decay rate of the averaged gradient.
        nesterov: use Nesterov momentum.
        ns_steps: number of Newton–Schulz steps.
        weight_decay: decoupled weight decay, multiplied by `lr`.
        maximize: maximize the objective instead of minimizing it.
        capturable: count steps on the parameter's device, for use in a CUDA graph.

    Raises:
        ValueError: invalid keyword value, complex parameter, parameter that is not a matrix, or sparse gradient.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        momentum: float = 0.9,
        nesterov: bool = False,
        ns_steps: int = 5,
        weight_decay: float = 0.1,
        *,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "nesterov": nesterov,
                "ns_steps": ns_steps,
                "weight_decay": weight_decay,
                "maximize": maximize,
                "capturable": capturable,
            },
        )

    def update_matrices(self, params: list[Tensor], group: Group) -> None:
        """Orthogonalize the momenta, batched by shape, and update the weights."""
        grads, momenta = self.moved_momenta(params, group)
        for stack in self.stacks(params, group):
            inputs = stack.of(momenta)
            if group["nesterov"]:
                inputs = stack.of(grads).lerp(inputs, group["momentum"])
            stack.subtract(muon_update(inputs, group["ns_steps"]), on_host(group["lr"]), group["weight_decay"])
