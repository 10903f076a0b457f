"""Adam: the rule for parameters that are not matrices, and the moments of Asro and AccAsro."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .base import Group, Scalar, State, gradient, on_host, state_dtype
from .rows import as_vectors, is_dense


def zero_moments(param: Tensor) -> State:
    """Return both moments, zeros with the strides of the parameter."""
    return {key: torch.zeros_like(param, dtype=state_dtype(param)) for key in ("exp_avg", "exp_avg_sq")}


def adam_scalars(group: Group, step: Scalar) -> dict[str, Scalar]:
    """Return the scalars of Adam's step `t`. `keep` multiplies the weight; `step_size` and `eps` correct the bias:

    `m̂ / (√v̂ + eps) = √(1 − β₂ᵗ) / (1 − β₁ᵗ) · m / (√v + eps √(1 − β₂ᵗ))`
    """
    if isinstance(step, Tensor):
        step = step.double()  # in float32, `1 - beta2**step` would lose digits
    lr, (beta1, beta2) = on_host(group["lr"]), group["betas"]
    root = (1 - beta2**step) ** 0.5
    return {
        "keep": 1 - lr * group["weight_decay"],
        "step_size": lr * root / (1 - beta1**step),
        "eps": group["eps"] * root,
        "weight1": 1 - beta1,
        "weight2": 1 - beta2,
        "beta2": beta2,
    }


def move_moments(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weight1: float | Tensor,
    weight2: float | Tensor,
    beta2: float | Tensor,
) -> None:
    """Update both moments of Adam (Kingma and Ba, arXiv 1412.6980, Algorithm 1) in place; `beta2` is `1 − weight2`.

    The square of a finite gradient can overflow to infinity. `lerp` would then return NaN, because it subtracts; this
    sum stays infinite, and the step of that element is zero.
    """
    exp_avg.lerp_(grad, weight1)
    exp_avg_sq.mul_(beta2)
    if isinstance(weight2, Tensor):
        exp_avg_sq.add_(grad * weight2 * grad)
    else:
        exp_avg_sq.addcmul_(grad, grad, value=weight2)


def scaled_adam_step(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scale: Tensor,
    *,
    keep: Scalar,
    step_size: Scalar,
    eps: Scalar,
) -> None:
    """Apply Adam's step times a scale for each element, in place, with decoupled weight decay; see `adam_scalars`.

    The scale is applied after the division: scale times first moment can overflow, and infinity / infinity is NaN.
    """
    direction = exp_avg / exp_avg_sq.sqrt().add_(eps)
    weight.mul_(keep)
    if isinstance(step_size, Tensor):
        weight.sub_(direction.mul_(scale).mul_(step_size))
    else:
        weight.addcmul_(direction, scale, value=-step_size)


def update_with_adam(params: list[Tensor], states: list[State], group: Group) -> None:
    """Perform one step of AdamW with PyTorch's fused kernel; all parameters have one device and dtype."""
    steps = [state["step"] for state in states]
    torch._foreach_add_(steps, 1.0)
    weights = [_dense(param) for param in params]
    rows = [
        as_vectors((weight, gradient(param, group["maximize"]), state["exp_avg"], state["exp_avg_sq"]))
        for weight, param, state in zip(weights, params, states, strict=True)
    ]
    vectors, grads, exp_avgs, exp_avg_sqs = (list(column) for column in zip(*rows, strict=True))
    beta1, beta2 = group["betas"]
    torch._fused_adamw_(
        vectors,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        lr=on_host(group["lr"]),
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
    )
    # The fused kernel does not, and autograd could not detect the in-place change.
    increment_version([*vectors, *exp_avgs, *exp_avg_sqs])
    for param, weight in zip(params, weights, strict=True):
        if weight is not param:
            param.copy_(weight)


def _dense(param: Tensor) -> Tensor:
    """Return the parameter in the dtype of its state, and dense: the fused kernel ignores strides."""
    weight = param.to(state_dtype(param))
    return weight if is_dense(weight) else weight.clone()
