"""Training steps as `asgo train gpt` makes them, one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from pipelines.config import GPTRunConfig
from pipelines.stopping import StopRequest
from pipelines.training.checkpoint_writer import CheckpointWriter
from pipelines.training.clock import Lap, StepClock
from pipelines.training.gpt_task import GPTTask
from pipelines.training.loop import Run, train_step
from pipelines.training.metrics import Row
from pipelines.training.parallel import compile_model
from pipelines.training.run_folder import RunFolder
from pipelines.training.train import fresh_state


class Trainer(Protocol):
    """A model under training, whoever wrote it."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of all its parameters."""

    def step(self) -> Lap:
        """One update from one global batch: how long it took, and how much of that was the optimizer's."""


class LoopTrainer:
    """A run of `asgo train gpt` that nothing is recorded of; not for float16, which needs a loss scale."""

    def __init__(self, config: GPTRunConfig, device: torch.device) -> None:
        torch.manual_seed(config.seed)
        task = GPTTask(config, device)
        state = fresh_state(task, config, device)
        self.optimizer = state.optimizer
        if config.runtime.compile:
            compile_model(task.model)
        folder = RunFolder(Path(config.data.folder, "run"))  # neither it nor the writer is ever used by a step
        writer = CheckpointWriter(folder, config.checkpoint.keep)
        self._run = Run(task, config, folder, state, _Silent(), StopRequest(), writer)

    def step(self) -> Lap:
        """One update from one global batch; waits for the device."""
        state = self._run.state
        state.clock.run()
        train_step(self._run)
        state.step += 1
        return end_lap(state.clock)


def end_lap(clock: StepClock) -> Lap:
    """The lap, and no more time counted until the next step: others take their turns meanwhile."""
    lap = clock.lap()
    clock.pause()
    return lap


class _Silent:
    """A step tells nothing."""

    def begin(self, first_step: int, last_step: int) -> None: ...

    def trained(self, row: Row) -> None: ...

    def validated(self, row: Row) -> None: ...

    def hung(self, message: str) -> None: ...

    def note(self, message: str) -> None: ...
