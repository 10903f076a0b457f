"""The template of the optimizers that treat every parameter on its own, whatever its shape."""

from __future__ import annotations

from torch import Tensor

from optim.base import BaseOptimizer, Group, State, apply_update, gradient


class ElementwiseOptimizer(BaseOptimizer):
    """Template: a subclass implements `new_state` and `param_update`."""

    def new_state(self, param: Tensor) -> State:
        """The state of a parameter before its first step."""
        raise AssertionError("a subclass implements this")

    def param_update(self, grad: Tensor, state: State, group: Group) -> Tensor:
        """Move the state by one step and return the update `U`, in the shape of `grad`."""
        raise AssertionError("a subclass implements this")

    def update_group(self, group: Group, params: list[Tensor]) -> None:
        """Update each parameter on its own."""
        for param in params:
            state = self.state[param]
            if not state:
                state.update(self.new_state(param))
            update = self.param_update(gradient(param), state, group)
            apply_update(param, update, group["lr"], group["weight_decay"])
