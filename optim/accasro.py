"""AccAsro: Asro with a scale that also grows, while a weight's gradient keeps its sign."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .adam import adam_scalars, move_moments, scaled_adam_step, zero_moments
from .asro import from_step
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
    """Update a weight and its state in place; all tensors have one shape. `step`: see `scaled_adam_step`.

    Flips are stored as 0.0 and 1.0, not as masks: `lerp` by 0 or 1 is exact, and several times faster on a CPU.
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
    """Adam with one scale per weight, which grows while the gradient keeps its sign and is restored when it flips.

    From step `scale_start_step` on, after the update of Adam's moments, in this order::

        s ← s_b                                             where the gradient's sign flipped
        s ← s − decrement, then s_b ← s                     where the first moment's sign flipped
        s ← s + increment · max(0, 1.01 − t / total_steps)  where the gradient's sign did not flip
        s ← clamp(s, min_scale, max_scale)

    and at every step `W ← (1 − lr · weight_decay) W − lr · s · m̂ / (√v̂ + eps)`. A sign flips if it and the last
    sign are opposite and neither is zero.

    Source: the Asro authors' `AccAsroFinalScale`; in their names, `lr = start_lr`, `max_scale = max_lr / start_lr`,
    `min_scale = min_lr / start_lr`, `scale_start_step = warmup_steps`. State: 17 bytes per element.

    Args:
        params: parameters of any shape, named or not, or parameter groups.
        lr: learning rate at scale 1, the initial scale of every weight.
        increment: added to the scale while the gradient keeps its sign, at the beginning of training.
        decrement: subtracted from the scale at a sign change of the first moment.
        max_scale: upper bound of the scale.
        min_scale: lower bound of the scale.
        total_steps: steps of the whole training. The increment falls to a hundredth over these steps, then to zero.
            `load_state_dict` does not change it, because a resumed training may be longer.
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
        """Return Adam's moments, both scales (ones), and the sign of the last gradient (zeros)."""
        scales = {key: torch.ones_like(param, dtype=state_dtype(param)) for key in ("scale", "saved_scale")}
        # Only the sign of the last gradient is used, so int8 is enough.
        return {**zero_moments(param), **scales, "last_sign": torch.zeros_like(param, dtype=torch.int8)}

    def scalars(self, group: Group, step: Scalar) -> dict[str, Scalar]:
        """Return Adam's scalars and those of the scales. Before `scale_start_step` they keep the scales at 1."""
        start = group["scale_start_step"]
        left = 1.01 - step / group["total_steps"]
        increment = group["increment"] * (left.clamp_min(0.0) if isinstance(left, Tensor) else max(0.0, left))
        return {
            **adam_scalars(group, step),
            "decrement": from_step(start, step, group["decrement"], 0.0),
            "min_scale": from_step(start, step, group["min_scale"], 1.0),
            "max_scale": from_step(start, step, group["max_scale"], 1.0),
            "increment": from_step(start, step, increment, 0.0),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict, but keep `total_steps` of each group. Warns if the state dict has another value."""
        own = [group["total_steps"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        loaded = [group["total_steps"] for group in self.param_groups]
        for group, total_steps in zip(self.param_groups, own, strict=True):
            group["total_steps"] = total_steps
        if loaded != own:
            pairs = sorted({f"{kept}, not {other}" for kept, other in zip(own, loaded, strict=True) if kept != other})
            warnings.warn(
                f"AccAsro keeps its own total_steps ({'; '.join(pairs)} as in the loaded state)", stacklevel=2
            )
