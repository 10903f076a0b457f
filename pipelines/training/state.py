"""All that changes while a run trains, with one owner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from optim.sharded import ShardedOptimizer
from pipelines.tensors import Tensors, copy_into, model_tensors, whole
from pipelines.training.average import WeightAverage
from pipelines.training.clock import StepClock
from pipelines.training.distributed import ALONE, Ranks
from pipelines.training.metrics import Row


@dataclass
class TrainState:
    """Model, optimizer, loss scaler, counters and records of a run after `step` steps.

    Each process has one. What is gathered for a checkpoint is whole, in host memory, and in the first process; to
    gather and to load are acts of all processes together.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    clock: StepClock
    ranks: Ranks = ALONE
    average: WeightAverage | None = None
    arithmetic: dict[str, str] = field(default_factory=dict)
    """What the run is computed with."""
    step: int = 0
    rows: list[Row] = field(default_factory=list)

    def validated(self) -> bool:
        """Whether the records hold a validation of the model as it is."""
        return any(row["split"] == "val" and row["step"] == self.step for row in reversed(self.rows[-2:]))

    def gather_model(self) -> Tensors:
        """Weights and buffers by name, a tied weight once."""
        return self._gather(model_tensors(self.model))

    def gather_average(self) -> Tensors:
        """Their moving averages, if there are any."""
        return {} if self.average is None else self._gather(self.average.tensors)

    def gather_optimizer(self) -> tuple[Tensors, dict[str, Any]]:
        """The optimizer's state as `<parameter name>/<key>`: tensors, and whatever is none."""
        if isinstance(self.optimizer, ShardedOptimizer):
            return _split(self.optimizer.gather_state() or {})
        states = {name: self.optimizer.state.get(param, {}) for name, param in self.model.named_parameters()}
        tensors, scalars = _split(states)
        return self._gather(tensors), scalars

    def load_model(self, tensors: Tensors, source: str) -> None:
        """Copy weights by name; `AsgoError` naming the first that does not fit."""
        copy_into(model_tensors(self.model), tensors, source)

    def load_average(self, tensors: Tensors, source: str) -> None:
        """Copy averages by name; `AsgoError` naming the first that does not fit."""
        if self.average is not None:
            copy_into(self.average.tensors, tensors, source)

    def load_optimizer(self, tensors: Tensors, scalars: dict[str, Any]) -> None:
        """Give the optimizer the state that `gather_optimizer` returned."""
        by_name: dict[str, dict[str, Any]] = {}
        for full_name, value in {**tensors, **scalars}.items():
            name, _, key = full_name.rpartition("/")
            by_name.setdefault(name, {})[key] = value
        if isinstance(self.optimizer, ShardedOptimizer):
            self.optimizer.load_state(by_name)
            return
        params = [param for group in self.optimizer.param_groups for param in group["params"]]
        position = {param: index for index, param in enumerate(params)}
        places = {name: position[param] for name, param in self.model.named_parameters() if param in position}
        state = {places[name]: values for name, values in by_name.items()}
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})

    def _gather(self, tensors: Tensors) -> Tensors:
        gathered = ((name, whole(tensor)) for name, tensor in tensors.items())
        # A transposed or channels-last tensor is saved by its values: loading copies them into its own layout.
        return {
            name: tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, tensor in gathered
            if self.ranks.is_first
        }


def _split(states: Mapping[str, Mapping[str, Any]]) -> tuple[Tensors, dict[str, Any]]:
    """States by parameter and key under one name each: the tensors, and the others."""
    flat = {f"{name}/{key}": value for name, state in states.items() for key, value in state.items()}
    tensors = {name: value for name, value in flat.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in flat.items() if name not in tensors}
