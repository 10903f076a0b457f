"""All that changes while a run trains, with one owner."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.errors import AsgoError
from pipelines.training.clock import StepClock
from pipelines.training.metrics import Row

Tensors = dict[str, Tensor]


@dataclass
class TrainState:
    """Model, optimizer, loss scaler, counters and records of a run after `step` steps."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    clock: StepClock
    step: int = 0
    rows: list[Row] = field(default_factory=list)

    def validated(self) -> bool:
        """Whether the records hold a validation of the model as it is."""
        return any(row["split"] == "val" and row["step"] == self.step for row in reversed(self.rows[-2:]))

    def model_tensors(self) -> Tensors:
        """Weights and buffers by name, a tied weight once."""
        buffers = {name: buffer for name, buffer in self.model.named_buffers() if name in self.model.state_dict()}
        return {**dict(self.model.named_parameters()), **buffers}

    def load_model_tensors(self, tensors: Tensors, source: str) -> None:
        """Copy weights by name; `AsgoError` naming the first that does not fit."""
        own = self.model_tensors()
        require_same_names(own, tensors, source)
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])

    def optimizer_tensors(self) -> tuple[Tensors, dict[str, Any]]:
        """The optimizer's state as `<parameter name>/<key>`: tensors, and whatever is none."""
        names = {param: name for name, param in self.model.named_parameters()}
        tensors: Tensors = {}
        scalars: dict[str, Any] = {}
        for param, name in names.items():
            for key, value in self.optimizer.state.get(param, {}).items():
                (tensors if isinstance(value, Tensor) else scalars)[f"{name}/{key}"] = value
        return tensors, scalars

    def load_optimizer_tensors(self, tensors: Tensors, scalars: dict[str, Any]) -> None:
        """Give the optimizer the state that `optimizer_tensors` returned."""
        params = [param for group in self.optimizer.param_groups for param in group["params"]]
        position = {param: index for index, param in enumerate(params)}
        by_name = {name: position[param] for name, param in self.model.named_parameters() if param in position}
        state: dict[int, dict[str, Any]] = {}
        for full_name, value in {**tensors, **scalars}.items():
            name, _, key = full_name.rpartition("/")
            state.setdefault(by_name[name], {})[key] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})


def require_same_names(own: Tensors, loaded: Tensors, source: str) -> None:
    """`AsgoError` unless both hold the same names with the same shapes."""
    for name in {**own, **loaded}:
        if name not in loaded:
            raise AsgoError(f"{source}: of another model: it has no {name!r}")
        if name not in own:
            raise AsgoError(f"{source}: of another model: its {name!r} is not in this one")
        if own[name].shape != loaded[name].shape:
            shapes = f"{tuple(loaded[name].shape)} there, {tuple(own[name].shape)} here"
            raise AsgoError(f"{source}: of another model: the shape of {name!r} is {shapes}")


def random_state(device: torch.device) -> Tensors:
    """The states of the random number generators that training draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type in ("cuda", "mps"):
        state[device.type] = getattr(torch, device.type).get_rng_state()
    return state


def set_random_state(state: Tensors) -> None:
    """Set the generators of the devices at hand to what `random_state` returned."""
    torch.set_rng_state(state["cpu"])
    for kind in ("cuda", "mps"):
        if kind in state and getattr(torch, kind).is_available():
            getattr(torch, kind).set_rng_state(state[kind])
