"""Training steps of `asgo train gpt`, one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from pipelines.config import GPTRunConfig
from pipelines.stopping import StopRequest
from pipelines.training.checkpoint_writer import CheckpointWriter
from pipelines.training.clock import Lap, StepClock
from pipelines.training.device import compiles
from pipelines.training.gpt_task import GPTTask
from pipelines.training.loop import train_step
from pipelines.training.metrics import Row
from pipelines.training.parallel import compile_model
from pipelines.training.run import Run
from pipelines.training.run_folder import RunFolder
from pipelines.training.train import fresh_state


class Trainer(Protocol):
    """A model in training: by our loop, or by plain PyTorch."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of all its parameters."""

    def step(self) -> Lap:
        """Make one update from one global batch; return its time, and the optimizer's part of it."""


class LoopTrainer:
    """A run of `asgo train gpt` that records nothing. Not for float16, which needs a loss scale."""

    def __init__(self, config: GPTRunConfig, device: torch.device) -> None:
        torch.manual_seed(config.seed)
        task = GPTTask(config, device)
        state = fresh_state(task.model, config, device)
        self.optimizer = state.optimizer
        if compiles(config.runtime, device):
            compile_model(task.model)
        folder = RunFolder(Path(config.data.folder, "run"))  # a step uses neither the folder nor the writer
        writer = CheckpointWriter(folder, config.checkpoint.keep)
        self._run = Run(task, config, folder, state, _Silent(), StopRequest(), writer)

    def step(self) -> Lap:
        """Make one update from one global batch; wait for the device."""
        state = self._run.state
        state.clock.run()
        train_step(self._run)
        state.step += 1
        return end_lap(state.clock)


def end_lap(clock: StepClock) -> Lap:
    """Return the lap and pause the clock: other contestants run before the next step."""
    lap = clock.lap()
    clock.pause()
    return lap


class _Silent:
    """A reporter that ignores all events."""

    def begin(self, first_step: int, last_step: int) -> None: ...

    def trained(self, row: Row) -> None: ...

    def validated(self, row: Row) -> None: ...

    def hung(self, message: str) -> None: ...

    def note(self, message: str) -> None: ...
