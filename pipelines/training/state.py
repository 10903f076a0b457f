"""The mutable state of a training run."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from optim.sharded import ShardedOptimizer
from pipelines.config import RunConfig
from pipelines.errors import AsgoError
from pipelines.imported_optimizers import one_line
from pipelines.tensors import Tensors, copy_into, model_tensors, whole
from pipelines.training.average import WeightAverage
from pipelines.training.clock import StepClock
from pipelines.training.distributed import ALONE, Ranks
from pipelines.training.imported import ImportedOptimizer
from pipelines.training.metrics import Row
from pipelines.training.packing import pack_states, unpack_states
from pipelines.training.schedule import Scheduler


@dataclass
class Shadow:
    """An optimizer that computes what it would do; see `pipelines.training.shadows`."""

    config: RunConfig
    """Configuration of the run, with the shadow's optimizer and schedule."""
    state: TrainState
    """Its model has a copy of the weights."""
    updates: int = 0
    """Number of gradients that it has received."""


@dataclass
class TrainState:
    """Model, optimizer, loss scaler, counters and records of a run after `step` steps.

    Each rank has one. The `gather_*` methods return whole tensors in host memory on rank 0, and nothing on other ranks.
    The `gather_*` and `load_*` methods are collectives: every rank must call them.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    clock: StepClock
    ranks: Ranks = ALONE
    average: WeightAverage | None = None
    imported: ImportedOptimizer | None = None
    """The optimizer, if it is of another library."""
    shadows: dict[str, Shadow] = field(default_factory=dict)
    """Shadow optimizers by name."""
    arithmetic: dict[str, str] = field(default_factory=dict)
    """What the run computes with; see `agree_on_arithmetic`."""
    step: int = 0
    rows: list[Row] = field(default_factory=list)

    def validated(self) -> bool:
        """Whether the metrics have a validation of the current step."""
        return any(row["split"] == "val" and row["step"] == self.step for row in reversed(self.rows[-2:]))

    def gather_model(self) -> Tensors:
        """Gather weights and buffers by name, a tied weight once."""
        return self._gather(model_tensors(self.model))

    def gather_average(self) -> Tensors:
        """Gather the weights to evaluate: the moving averages, or those of a schedule-free optimizer; else nothing."""
        if self.average is not None:
            return self._gather(self.average.tensors)
        if self.imported is None or not self.imported.has_modes:
            return {}
        with self.imported.evaluation_weights():
            return self.gather_model()

    def evaluation_weights(self) -> contextlib.AbstractContextManager[None]:
        """Context manager in which the model has the weights to evaluate; see `gather_average`."""
        if self.average is not None:
            return self.average.in_place_of_weights()
        return contextlib.nullcontext() if self.imported is None else self.imported.evaluation_weights()

    def around_step(self, seed: int) -> contextlib.AbstractContextManager[None]:
        """Context manager around an optimizer step; see `ImportedOptimizer.around_step`."""
        if self.imported is None:
            return contextlib.nullcontext()
        return self.imported.around_step(seed, self.step, self.clock.device)

    def gather_optimizer(self) -> tuple[Tensors, dict[str, Any]]:
        """Gather the optimizer's state by `<parameter name>/<key>`; returns tensors and other values separately."""
        tensors: Tensors = {}
        if self.imported is not None:
            values = self.imported.gather_state(tensors)
        elif isinstance(self.optimizer, ShardedOptimizer):
            return tensors, pack_states(self.optimizer.gather_state() or {}, tensors)
        else:
            states = {name: self.optimizer.state.get(param, {}) for name, param in self.model.named_parameters()}
            values = pack_states(states, tensors)
        return self._gather(tensors), values

    def load_model(self, tensors: Tensors, source: str) -> None:
        """Copy weights by name. Raises `AsgoError` with the first name that does not fit."""
        copy_into(model_tensors(self.model), tensors, source)

    def load_average(self, tensors: Tensors, source: str) -> None:
        """Copy averages by name. Raises `AsgoError` with the first name that does not fit."""
        if self.average is not None:
            copy_into(self.average.tensors, tensors, source)

    def load_optimizer(self, tensors: Tensors, scalars: dict[str, Any]) -> None:
        """Load what `gather_optimizer` returned. Raises `AsgoError` if an optimizer of another library refuses it."""
        if self.imported is not None:
            try:
                self.imported.load_state(tensors, scalars)
            except Exception as error:  # code of other libraries, and of a checkpoint that may be a stranger's
                reason = str(error) if isinstance(error, AsgoError) else one_line(error)
                raise AsgoError(f"the saved state of the optimizer cannot be loaded: {reason}") from error
            return
        by_name = unpack_states(tensors, scalars)
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
        # Contiguous, also where the model has a transposed or channels-last layout: loading copies by value.
        return {
            name: tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, tensor in gathered
            if self.ranks.is_first
        }
