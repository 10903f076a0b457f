"""Asro: Adam whose step shrinks, element by element, where the first moment changes its sign."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from optim.adam import adam_direction, adam_state, update_moments
from optim.base import Group, State, state_dtype
from optim.elementwise import ElementwiseOptimizer


def asro_update(
    grad: Tensor,
    state: State,
    *,
    decrement: float,
    min_scale: float,
    scale_start_step: int,
    betas: tuple[float, float],
    eps: float,
) -> Tensor:
    """Move the state of one parameter by one step and return its update `U`, in the shape of `grad`."""
    old_sign = state["exp_avg"].sign()
    update_moments(grad, state, betas)
    scale = state["scale"]
    if state["step"] >= scale_start_step:
        flipped = old_sign.mul_(state["exp_avg"].sign()) < 0
        scale.add_(flipped, alpha=-decrement).clamp_(min_scale, 1.0)
    return adam_direction(state, betas, eps).mul_(scale)


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

    Raises:
        ValueError: a keyword out of range, a complex parameter, a sparse gradient.
    """

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
            },
        )

    def new_state(self, param: Tensor) -> State:
        """Adam's, and the scale, ones."""
        return {**adam_state(param), "scale": torch.ones_like(param, dtype=state_dtype(param))}

    def param_update(self, grad: Tensor, state: State, group: Group) -> Tensor:
        """Algorithm 1 on one parameter."""
        return asro_update(
            grad,
            state,
            decrement=group["decrement"],
            min_scale=group["min_scale"],
            scale_start_step=group["scale_start_step"],
            betas=group["betas"],
            eps=group["eps"],
        )
