"""Muon: orthogonalized momentum."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .base import Group, on_host
from .matrix_functions import MUON_COEFFICIENTS, bfloat16_on_cpu, orthogonalize
from .matrix_optimizer import UPDATE_RMS, MatrixOptimizer
from .specs import UpdateScale


def muon_update(
    momenta: Tensor, scales: Sequence[float], steps: int, coefficients: tuple[float, float, float] = MUON_COEFFICIENTS
) -> Tensor:
    """Orthogonalize momenta, shape (k, m, n), and multiply each by its scale."""
    updates = orthogonalize(momenta, steps, coefficients)
    torch._foreach_mul_(list(updates), scales)  # numbers of the host: nothing is copied to a GPU
    return updates


def update_scale(shape: tuple[int, int], rule: UpdateScale) -> float:
    """Return the factor of the orthogonalized momentum of a matrix (rows, columns); see `Muon`."""
    rows, columns = shape
    if rule == "original":
        return math.sqrt(max(1.0, rows / columns))
    return UPDATE_RMS * math.sqrt(max(rows, columns))


class Muon(MatrixOptimizer):
    """Momentum orthogonalized by Newton–Schulz, scaled to the RMS of AdamW's updates.

    At each step, for a gradient `G` of shape (m, n)::

        M ← lerp(M, G, 1 − momentum)
        U ← 0.2 √max(m, n) · orthogonalize(lerp(G, M, momentum) if nesterov else M)
        W ← (1 − lr · weight_decay) W − lr · U

    With `adjust_lr_fn="original"`, the factor is √max(1, m / n) instead.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; scaling of Liu et al., arXiv
    2502.16982. Equivalent to `torch.optim.Muon` with the same `adjust_lr_fn`. State: the momentum.

    Args:
        params: parameters with at least two dimensions (flattened to two), named or not, or parameter groups; groups
            with `rule="adam"` accept any shape.
        lr: learning rate; values for AdamW work with `match_rms_adamw`.
        momentum: decay rate of the averaged gradient.
        nesterov: use Nesterov momentum.
        ns_steps: number of Newton–Schulz steps.
        weight_decay: decoupled weight decay, multiplied by `lr`.
        ns_coefficients: coefficients (a, b, c) of a Newton–Schulz step; see `optim.matrix_functions.orthogonalize`.
        adjust_lr_fn: `match_rms_adamw` or `original`, the names of `torch.optim.Muon`.
        maximize: maximize the objective instead of minimizing it.
        capturable: count steps on the parameter's device, for use in a CUDA graph.

    Raises:
        ValueError: invalid keyword value, complex parameter, parameter that is not a matrix, or sparse gradient.
    """

    orthogonalizes = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        momentum: float = 0.9,
        nesterov: bool = False,
        ns_steps: int = 5,
        weight_decay: float = 0.1,
        ns_coefficients: tuple[float, float, float] = MUON_COEFFICIENTS,
        adjust_lr_fn: UpdateScale = "match_rms_adamw",
        *,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        bfloat16_on_cpu()  # measures now, because `torch.compile` cannot trace it in `step`
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "nesterov": nesterov,
                "ns_steps": ns_steps,
                "weight_decay": weight_decay,
                "ns_coefficients": ns_coefficients,
                "adjust_lr_fn": adjust_lr_fn,
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
            scales = [update_scale(block.shape, group["adjust_lr_fn"]) for block in stack.blocks]
            updates = muon_update(inputs, scales, group["ns_steps"], group["ns_coefficients"])
            stack.subtract(updates, on_host(group["lr"]), group["weight_decay"])
