"""Muon: the momentum, orthogonalized."""

from __future__ import annotations

import math

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .base import Group, on_host
from .matrix_functions import orthogonalize
from .matrix_optimizer import UPDATE_RMS, MatrixOptimizer


def muon_update(momenta: Tensor, steps: int) -> Tensor:
    """Orthogonalized momenta, shape (k, m, n), with a root mean square near 0.2."""
    return UPDATE_RMS * math.sqrt(max(momenta.shape[-2:])) * orthogonalize(momenta, steps)


class Muon(MatrixOptimizer):
    """Momentum orthogonalized by Newton–Schulz, scaled to the root mean square of AdamW's updates.

    At each step, for a gradient `G` of shape (m, n)::

        M ← lerp(M, G, 1 − momentum)
        U ← 0.2 √max(m, n) · orthogonalize(lerp(G, M, momentum) if nesterov else M)
        W ← (1 − lr · weight_decay) W − lr · U

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; scaling of Liu et al., arXiv
    2502.16982. The same as `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`. State: the momentum.

    Args:
        params: parameters of two or more dimensions (later ones are flattened into columns), named or not, or groups
            of them; a group with `rule="adam"` takes any shape.
        lr: learning rate; AdamW's carry over.
        momentum: decay rate of the averaged gradient.
        nesterov: whether the update looks one step of momentum ahead.
        ns_steps: Newton–Schulz steps.
        weight_decay: decoupled weight decay, a share of `lr`.
        maximize: climb the gradient instead of descending.
        capturable: count steps on the parameter's device, for a step inside a CUDA graph.

    Raises:
        ValueError: a keyword out of range, a parameter that is complex or no matrix, a sparse gradient.
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
        """Orthogonalize the momenta, those of equal shape together."""
        grads, momenta = self.moved_momenta(params, group)
        for stack in self.stacks(params, group):
            inputs = stack.of(momenta)
            if group["nesterov"]:
                inputs = stack.of(grads).lerp(inputs, group["momentum"])
            stack.subtract(muon_update(inputs, group["ns_steps"]), on_host(group["lr"]), group["weight_decay"])
