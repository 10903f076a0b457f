"""AccAsro: Asro that also accelerates, as long as a weight's gradient keeps its sign."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from optim.adam import adam_direction, adam_state, update_moments
from optim.base import Group, State, state_dtype
from optim.elementwise import ElementwiseOptimizer


def accasro_update(
    grad: Tensor,
    state: State,
    *,
    increment: float,
    decrement: float,
    max_scale: float,
    min_scale: float,
    total_steps: int,
    scale_start_step: int,
    betas: tuple[float, float],
    eps: float,
) -> Tensor:
    """Move the state of one parameter by one step and return its update `U`, in the shape of `grad`."""
    old_sign = state["exp_avg"].sign()
    update_moments(grad, state, betas)
    grad_sign = grad.sign().to(torch.int8)
    step = state["step"].item()
    if step >= scale_start_step:
        scale, saved_scale = state["scale"], state["saved_scale"]
        grad_flipped = grad_sign * state["last_sign"] < 0
        moment_flipped = old_sign.mul_(state["exp_avg"].sign()) < 0
        torch.where(grad_flipped, saved_scale, scale, out=scale)
        scale.add_(moment_flipped, alpha=-decrement)
        torch.where(moment_flipped, scale, saved_scale, out=saved_scale)
        scale.add_(~grad_flipped, alpha=increment * (1.01 - step / total_steps))
        scale.clamp_(min_scale, max_scale)
    state["last_sign"].copy_(grad_sign)
    return adam_direction(state, betas, eps).mul_(state["scale"])


class AccAsro(ElementwiseOptimizer):
    """Adam with a scale a weight, which grows while the gradient keeps its sign and falls back when it flips.

    From step `scale_start_step` on, after Adam's moments have moved, in this order::

        s ← s_b                                       where the gradient's sign flipped
        s ← s − decrement, then s_b ← s               where the first moment's sign flipped
        s ← s + increment · (1.01 − t / total_steps)  where the gradient's sign did not flip
        s ← clamp(s, min_scale, max_scale)

    and at every step `W ← (1 − lr · weight_decay) W − lr · s · m̂ / (√v̂ + eps)`. A sign flips when it and the last
    one are opposite and neither is zero.

    Source: the Asro authors' `AccAsroFinalScale`; in their terms `lr = start_lr`, `max_scale = max_lr / start_lr`,
    `min_scale = min_lr / start_lr`, `scale_start_step = warmup_steps`. State: 17 bytes a parameter.

    Args:
        params: parameters of any shape, named or not, or groups of them.
        lr: learning rate at scale 1, where every weight starts.
        increment: what a kept sign adds to the scale, at the beginning of training.
        decrement: what a sign change of the first moment takes from the scale.
        max_scale: the largest scale.
        min_scale: the smallest scale.
        total_steps: steps of the whole training, over which the increment falls to a hundredth.
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
        increment: float,
        decrement: float,
        max_scale: float,
        min_scale: float,
        total_steps: int,
        scale_start_step: int = 0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "increment": increment,
                "decrement": decrement,
                "max_scale": max_scale,
                "min_scale": min_scale,
                "total_steps": total_steps,
                "scale_start_step": scale_start_step,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
            },
        )

    def new_state(self, param: Tensor) -> State:
        """Adam's, both scales, ones, and the sign of the last gradient, zeros."""
        scales = {key: torch.ones_like(param, dtype=state_dtype(param)) for key in ("scale", "saved_scale")}
        # Only the sign of the last gradient is ever used: one byte holds it.
        return {**adam_state(param), **scales, "last_sign": torch.zeros_like(param, dtype=torch.int8)}

    def param_update(self, grad: Tensor, state: State, group: Group) -> Tensor:
        """The rules above on one parameter."""
        return accasro_update(
            grad,
            state,
            increment=group["increment"],
            decrement=group["decrement"],
            max_scale=group["max_scale"],
            min_scale=group["min_scale"],
            total_steps=group["total_steps"],
            scale_start_step=group["scale_start_step"],
            betas=group["betas"],
            eps=group["eps"],
        )
