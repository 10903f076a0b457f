"""Adam's moments: the rule of the parameters that a matrix optimizer leaves, and the base of Asro and AccAsro."""

from __future__ import annotations

import torch
from torch import Tensor

from optim.base import State, new_step, state_dtype


def adam_state(param: Tensor) -> State:
    """Both moments, zeros in the shape of the parameter, and the count of steps."""
    moments = {key: torch.zeros_like(param, dtype=state_dtype(param)) for key in ("exp_avg", "exp_avg_sq")}
    return {"step": new_step(), **moments}


def update_moments(grad: Tensor, state: State, betas: tuple[float, float]) -> None:
    """Count the step and move both moments of Adam (Kingma and Ba, arXiv 1412.6980, Algorithm 1), in place."""
    beta1, beta2 = betas
    state["step"] += 1
    state["exp_avg"].lerp_(grad, 1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)


def adam_direction(state: State, betas: tuple[float, float], eps: float) -> Tensor:
    """`m̂ / (√v̂ + eps)` with bias corrections, in the shape of the parameter."""
    beta1, beta2 = betas
    step = state["step"].item()
    denominator = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(eps)
    return (state["exp_avg"] / (1 - beta1**step)).div_(denominator)
