"""Asro: Adam with a step size per weight that decreases when the first moment changes its sign."""

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
    """Update a weight and its state in place; all tensors have one shape. `step`: see `scaled_adam_step`."""
    flipped = exp_avg.sign()
    move_moments(grad, exp_avg, exp_avg_sq, weight1, weight2, beta2)
    flipped.mul_(exp_avg).lt_(0)  # 1 where the sign flipped, else 0
    add_scaled_(scale, flipped, -decrement).clamp_(min_scale, max_scale)  # type: ignore[arg-type]
    scaled_adam_step(weight, exp_avg, exp_avg_sq, scale, **step)


def from_step(start: int, step: Scalar, value: float | Tensor, before: float) -> Scalar:
    """Return `value` from step `start` on, else `before`; a tensor if `step` is one, without synchronization."""
    if isinstance(step, Tensor):
        return torch.where(step >= start, value, before)
    return value if step >= start else before


class Asro(ElementwiseOptimizer):
    """Adam with one scale per weight, which starts at 1 and decreases at every sign change of the first moment.

    At step `t`, with gradient `G`::

        σ = sign(m);  m ← β₁ m + (1 − β₁) G;  v ← β₂ v + (1 − β₂) G²
        if t ≥ scale_start_step:
            s ← s − decrement   where sign(m) = −σ ≠ 0
            s ← clamp(s, min_scale, 1)
        W ← (1 − lr · weight_decay) W − lr · s · m̂ / (√v̂ + eps)

    Source: "Asro: Sign-Based Optimization for Stochastic Learning", Algorithm 1. State: 12 bytes per element.

    Args:
        params: parameters of any shape, named or not, or parameter groups.
        lr: learning rate at scale 1, the largest of any weight.
        decrement: subtracted from the scale at a sign change.
        min_scale: lower bound of the scale.
        scale_start_step: first step (1-based) at which scales change.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay, multiplied by `lr`.
        maximize: maximize the objective instead of minimizing it.
        capturable: count steps on the parameter's device, for use in a CUDA graph; a changing `lr` must then be a
            tensor on that device.

    Raises:
        ValueError: invalid keyword value, complex parameter, or sparse gradient.
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
        """Return Adam's moments, and the scale (ones)."""
        return {**zero_moments(param), "scale": torch.ones_like(param, dtype=state_dtype(param))}

    def scalars(self, group: Group, step: Scalar) -> dict[str, Scalar]:
        """Return Adam's scalars and those of the scale. Before `scale_start_step` they keep the scale at 1."""
        start = group["scale_start_step"]
        return {
            **adam_scalars(group, step),
            "decrement": from_step(start, step, group["decrement"], 0.0),
            "min_scale": from_step(start, step, group["min_scale"], 1.0),
            "max_scale": from_step(start, step, 1.0, 1.0),
        }
