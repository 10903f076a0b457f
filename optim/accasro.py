"""AccAsro: Asro that also accelerates, as long as a weight's gradient keeps its sign."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .adam import adam_scalars, move_moments, scaled_adam_step, zero_moments
from .asro import since
from .base import Group, Scalar, State, state_dtype
from .elementwise import ElementwiseOptimizer
from .rows import add_scaled_


def accasro_update(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scale: Tensor,
    saved_scale: Tensor,
    last_sign: Tensor,
    *,
    weight1: float | Tensor,
    weight2: float | Tensor,
    beta2: float | Tensor,
    decrement: Scalar,
    min_scale: Scalar,
    max_scale: Scalar,
    increment: Scalar,
    **step: Scalar,
) -> None:
    """Move a weight and its state by one step, in place; all tensors of one shape. `step`: see `scaled_adam_step`.

    Where a sign flipped is held in numbers, not in masks: `lerp` by 0 or 1 is exact, and several times faster on a CPU.
    """
    moment_flipped = exp_avg.sign()
    move_moments(grad, exp_avg, exp_avg_sq, weight1, weight2, beta2)
    moment_flipped.mul_(exp_avg).lt_(0)  # 1 where the sign flipped, else 0
    grad_sign = grad.sign()
    grad_kept = last_sign.to(grad.dtype, copy=True).mul_(grad_sign).ge_(0)  # 0 where the sign flipped, else 1
    last_sign.copy_(grad_sign)

    torch.lerp(saved_scale, scale, grad_kept, out=scale)
    add_scaled_(scale, moment_flipped, -decrement)
    saved_scale.lerp_(scale, moment_flipped)
    add_scaled_(scale, grad_kept, increment).clamp_(min_scale, max_scale)  # type: ignore[arg-type]
    scaled_adam_step(weight, exp_avg, exp_avg_sq, scale, **step)


class AccAsro(ElementwiseOptimizer):
    """Adam with a scale a weight, which grows while the gradient keeps its sign and falls back when it flips.

    From step `scale_start_step` on, after Adam's moments have moved, in this order::

        s ← s_b                                             where the gradient's sign flipped
        s ← s − decrement, then s_b ← s                     where the first moment's sign flipped
        s ← s + increment · max(0, 1.01 − t / total_steps)  where the gradient's sign did not flip
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
        total_steps: steps of the whole training, over which the increment falls to a hundredth; beyond them, to zero.
            `load_state_dict` keeps this number, since a training that is resumed may be longer than it was.
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

    update = staticmethod(accasro_update)
    kernel = "accasro"
    state_keys = ("exp_avg", "exp_avg_sq", "scale", "saved_scale", "last_sign")

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
        *,
        maximize: bool = False,
        capturable: bool = False,
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
                "maximize": maximize,
                "capturable": capturable,
            },
        )

    def new_state(self, param: Tensor) -> State:
        """Adam's moments, both scales, ones, and the sign of the last gradient, zeros."""
        scales = {key: torch.ones_like(param, dtype=state_dtype(param)) for key in ("scale", "saved_scale")}
        # Only the sign of the last gradient is ever used: one byte holds it.
        return {**zero_moments(param), **scales, "last_sign": torch.zeros_like(param, dtype=torch.int8)}

    def scalars(self, group: Group, step: Scalar) -> dict[str, Scalar]:
        """Adam's, and those of the scales, which leave them at 1 before `scale_start_step`."""
        start = group["scale_start_step"]
        left = 1.01 - step / group["total_steps"]
        increment = group["increment"] * (left.clamp_min(0.0) if isinstance(left, Tensor) else max(0.0, left))
        return {
            **adam_scalars(group, step),
            "decrement": since(start, step, group["decrement"], 0.0),
            "min_scale": since(start, step, group["min_scale"], 1.0),
            "max_scale": since(start, step, group["max_scale"], 1.0),
            "increment": since(start, step, increment, 0.0),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, with each group's own `total_steps`; warns where the state has another."""
        own = [group["total_steps"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        loaded = [group["total_steps"] for group in self.param_groups]
        for group, total_steps in zip(self.param_groups, own, strict=True):
            group["total_steps"] = total_steps
        if loaded != own:
            pairs = sorted({f"{mine}, not {its}" for mine, its in zip(own, loaded, strict=True) if mine != its})
            warnings.warn(
                f"AccAsro keeps its own total_steps ({'; '.join(pairs)} as in the loaded state)", stacklevel=2
            )
