"""What all optimizers here share: checks, the step, and a state that loads in the precision it was saved in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from optim.keywords import check_keywords, unknown_name

State = dict[str, Tensor]
Group = dict[str, Any]


class BaseOptimizer(torch.optim.Optimizer):
    """Template: a subclass implements `update_group`, and inherits everything that a training loop touches.

    State is kept in float32 for parameters of lower precision, else in the parameter's own precision.
    """

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        check_keywords(defaults)
        super().__init__(params, defaults)

    def update_group(self, group: Group, params: list[Tensor]) -> None:
        """Update `params`, those of `group` that have a gradient, in place."""
        raise AssertionError("a subclass implements this")

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step with the gradients at hand; returns the loss of `closure` where one is given.

        Raises `ValueError` for a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refuse_sparse_gradients()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if params:
                self.update_group(group, params)
        return loss

    def _refuse_sparse_gradients(self) -> None:
        for group in self.param_groups:
            for index, param in enumerate(group["params"]):
                if param.grad is not None and param.grad.is_sparse:
                    raise ValueError(
                        f"{type(self).__name__} cannot use the sparse gradient of {describe(group, index)}"
                    )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with any keyword of the constructor overridden for them.

        Raises `ValueError` for an unknown keyword, a value out of range, or a parameter this optimizer cannot take.
        """
        for key in param_group:
            if key not in self.known_group_keys():
                raise unknown_name("parameter group key", key, sorted(self.known_group_keys()))
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_keywords(group)
            for index, param in enumerate(group["params"]):
                self.check_param(group, index, param)
        except ValueError:
            self.param_groups.pop()
            raise

    def known_group_keys(self) -> set[str]:
        """The keys that a parameter group may hold."""
        return {"params", "param_names", "initial_lr", *self.defaults}

    def check_param(self, group: Group, index: int, param: Tensor) -> None:
        """Raise `ValueError` if this optimizer cannot take the parameter."""
        if not param.is_floating_point():
            raise ValueError(f"{type(self).__name__} takes real parameters; {describe(group, index)} is {param.dtype}")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; unlike the base class, keep each tensor's own dtype (int8 signs, float32 moments)."""
        super().load_state_dict(state_dict)
        saved_ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for saved_id, param in zip(saved_ids, params, strict=True):
            for key, value in state_dict["state"].get(saved_id, {}).items():
                if isinstance(value, Tensor):
                    self.state[param][key] = value.to(device=self.state[param][key].device, copy=True)


def describe(group: Group, index: int) -> str:
    """A parameter as a user knows it: its name where names were given, else its position and shape."""
    shape = tuple(group["params"][index].shape)
    names = group.get("param_names")
    return f"parameter {names[index]!r} of shape {shape}" if names else f"parameter {index} of shape {shape}"


def state_dtype(param: Tensor) -> torch.dtype:
    """The precision in which a parameter's state is kept and its update computed."""
    return torch.promote_types(param.dtype, torch.float32)


def new_step() -> Tensor:
    """A parameter's count of steps, zero; on the host, in float32 whatever the default dtype: bfloat16 ends at 256."""
    return torch.zeros((), dtype=torch.float32, device="cpu")


def gradient(param: Tensor) -> Tensor:
    """The gradient of a parameter, in the precision of its state."""
    assert param.grad is not None
    return param.grad.to(state_dtype(param))


def apply_update(param: Tensor, update: Tensor, lr: float | Tensor, weight_decay: float) -> None:
    """`W ← (1 − lr · weight_decay) W − lr · U`, rounded once where the parameter has a lower precision than `U`."""
    weight = param.to(update.dtype)
    if weight_decay != 0:
        weight.mul_(1 - lr * weight_decay)
    weight.sub_(update.mul_(lr))
    if weight is not param:
        param.copy_(weight)
