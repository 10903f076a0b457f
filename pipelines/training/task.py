"""The interface between the training loop and a task."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn

Batch = tuple[Tensor, ...]


class Task(Protocol):
    """Data, model and loss of a training run."""

    network: nn.Module
    """What the forward pass calls: the model, or its DDP wrapper."""

    @property
    def model(self) -> nn.Module:
        """The model, on its device."""

    @property
    def tokens_per_sample(self) -> int:
        """Tokens in a row of a batch; 1 for an image."""

    def load_initial_weights(self) -> list[str]:
        """Load the weights that a new run begins with, if its configuration names some; return lines for the user."""

    def micro_batches(self, step: int) -> Iterable[Batch]:
        """Micro-batches of this rank for a step (0-based), of equal size, on the host; a pure function of the step."""

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss of a micro-batch, shape (), on the model's device."""

    def probing(self) -> AbstractContextManager[None]:
        """Context manager in which `micro_batches` and `loss` do not count for `training_metrics`."""

    def training_metrics(self) -> dict[str, float]:
        """Metrics of the last step besides its loss, over all ranks; may synchronize with the device."""

    def evaluate(self, should_stop: Callable[[], bool]) -> dict[str, float] | None:
        """Metrics of the validation data, which is always the same, over all ranks; None if `should_stop` ended it."""

    def epoch_at(self, step: int) -> float:
        """Epochs of training data after `step` steps."""

    def notes(self) -> list[str]:
        """Lines for the user about the data, at the end of training."""

    def close(self) -> None:
        """Release the data's resources. No other method is called afterwards."""

    def description(self) -> dict[str, Any]:
        """What a checkpoint records of the data, as JSON values; `fingerprint` identifies its content."""
