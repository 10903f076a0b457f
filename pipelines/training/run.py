"""What the parts of the training loop share: a run in progress."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from pipelines.config import RunConfig
from pipelines.stopping import StopRequest
from pipelines.training.checkpoint_writer import CheckpointWriter
from pipelines.training.clock import FinishedLap
from pipelines.training.distributed import LocalBatch, local_batch
from pipelines.training.metrics import Row
from pipelines.training.reporter import Reporter
from pipelines.training.run_folder import RunFolder
from pipelines.training.state import TrainState
from pipelines.training.task import Batch, Task


@dataclass
class Run:
    """State of a training run, for `fit`."""

    task: Task
    config: RunConfig
    folder: RunFolder
    state: TrainState
    reporter: Reporter
    stop: StopRequest
    writer: CheckpointWriter
    heartbeat: Callable[[str], None] = lambda activity: None
    """Tells the watchdog that the run makes progress, and what it does."""
    saved: tuple[int, int] | None = None
    """Step and number of records of the newest checkpoint."""
    warned_of_slow_saves: bool = False
    around_step: Callable[[int], contextlib.AbstractContextManager[None]] = lambda step: contextlib.nullcontext()
    """Context manager around `optimizer.step()`, for measurements; called with the number of the step."""

    unrecorded: tuple[Row, FinishedLap] | None = None
    """Metrics of the last step, which lack its times."""
    micro_batch_size: int | None = None
    """Rows of a forward pass, if a micro-batch of the task does not fit into the memory; divides its size."""

    @property
    def rows_at_once(self) -> int:
        """Rows of a forward pass."""
        return self.micro_batch_size or self._local_batch.micro_batch_size

    @property
    def passes(self) -> int:
        """Forward passes of a step."""
        return len(self._local_batch.rows) // self.rows_at_once

    def batches(self, ahead: int = 0) -> Iterator[Batch]:
        """Yield what each forward pass of the next step gets, or of the step that comes `ahead` steps after it."""
        for batch in self.task.micro_batches(self.state.step + ahead):
            if self.micro_batch_size is None:
                yield batch
            else:
                yield from zip(*(torch.split(part, self.micro_batch_size) for part in batch), strict=True)

    @property
    def _local_batch(self) -> LocalBatch:
        return local_batch(self.config.training, self.state.ranks)

    def should_stop(self) -> bool:
        """Whether a signal asks any rank to save and stop. A collective: every rank must call it."""
        return self.state.ranks.any(bool(self.stop))
