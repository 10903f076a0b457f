"""Asro: Adam whose step shrinks, element by element, where the first moment changes its sign."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .adam import adam_scalars, move_moments, scaled_adam_step, zero_moments
from .base import Group, Scalar, State, state_dtype
from .elementwise import ElementwiseOptimizer
from .rows import add_scaled_


def asro_update(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scale: Tensor,
    *,
    weight1: float | Tensor,
    weight2: float | Tensor,
    beta2: float | Tensor,
    decrement: Scalar,
    min_scale: Scalar,
    max_scale: Scalar,
    **step: Scalar,
) -> None:
    """Move a weight and its state by one step, in place; all tensors of one shape. `step`: see `scaled_adam_step`."""
    flipped = exp_avg.sign()
    move_moments(grad, exp_avg, exp_avg_sq, weight1, weight2, beta2)
    flipped.mul_(exp_avg).lt_(0)  # 1 where the sign flipped, else 0
    add_scaled_(scale, flipped, -decrement).clamp_(min_scale, max_scale)  # type: ignore[arg-type]
    scaled_adam_step(weight, exp_avg, exp_avg_sq, scale, **step)


def since(start: int, step: Scalar, value: float | Tensor, before: float) -> Scalar:
    """`value` from step `start` on, and `before` until then; decided on the device where the step is there."""
    if isinstance(step, Tensor):
        return torch.where(step >= start, value, before)
    return value if step >= start else before


class Asro(ElementwiseOptimizer):
    """Adam with a scale a weight, which starts at 1 and falls at every sign change of the first moment.

    At step `t`, with gradient `G`::

        σ = sign(m);  m ← β₁ m + (1 − β₁) G;  v ← β₂ v + (1 − β₂) G²
        if t ≥ scale_start_step:
            s ← s − decrement   where sign(m) = −σ ≠ 0
            s ← clamp(s, min_scale, 1)
        W ← (1 − lr · weight_decay) W − lr · s · m̂ / (√v̂ + eps)

    Source: "Asro: Sign-Based Optimization for Stochastic Learning", Algorithm 1. State: 12 bytes a parameter.

    Args:
        params: parameters of any shape, named or not, or groups of them.
        lr: learning rate at scale 1, the largest that any weight sees.
        decrement: what a sign change takes from the scale.
        min_scale: the smallest scale.
        scale_start_step: the first step (1-based) at which scales change.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay, a share of `lr`.
        maximize: climb the gradient instead of descending.
        capturable: count steps on the parameter's device, for a step inside a CUDA graph; needs `lr` as a tensor there
            if it changes.

    Raises:
        ValueError: a keyword out of range, a complex parameter, a sparse gradient.
    """

    update = staticmethod(asro_update)
    kernel = "asro"
    state_keys = ("exp_avg", "exp_avg_sq", "scale")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        decrement: float,
        min_scale: float,
        scale_start_step: int = 0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "decrement": decrement,
                "min_scale": min_scale,
                "scale_start_step": scale_start_step,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "maximize": maximize,
                "capturable": capturable,
            },
        )

    def new_state(self, param: Tensor) -> State:
        """Adam's moments, and the scale, ones."""
        return {**zero_moments(param), "scale": torch.ones_like(param, dtype=state_dtype(param))}

    def scalars(self, group: Group, step: Scalar) -> dict[str, Scalar]:
        """Adam's, and those of the scale, which leave it at 1 before `scale_start_step`."""
        start = group["scale_start_step"]
        return {
            **adam_scalars(group, step),
            "decrement": since(start, step, group["decrement"], 0.0),
            "min_scale": since(start, step, group["min_scale"], 1.0),
            "max_scale": since(start, step, 1.0, 1.0),
        }
