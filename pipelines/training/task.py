"""What the training loop needs to know of a task; the only thing that differs between GPT and ImageNet."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import Tensor, nn

Batch = tuple[Tensor, ...]


class Task(Protocol):
    """Data, model and loss of a training run."""

    network: nn.Module
    """What the forward pass calls: the model, or that which adds up its gradients over the processes."""

    @property
    def model(self) -> nn.Module:
        """The model under training, on its device."""

    @property
    def tokens_per_sample(self) -> int:
        """Tokens in one row of a batch; 1 for an image."""

    def load_initial_weights(self) -> None:
        """Load the weights that a new run begins with, if its configuration names some."""

    def micro_batches(self, step: int) -> Iterable[Batch]:
        """This process's rows of the batch of a step (0-based), in equal parts, on the host; a function of the step."""

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss of a micro-batch on the model's device, shape ()."""

    def training_figures(self) -> dict[str, float]:
        """Figures of the step just made beside its loss, of all processes, for a record; may wait for the device."""

    def evaluate(self, should_stop: Callable[[], bool]) -> dict[str, float] | None:
        """Figures of the validation data, always the same, over all processes; None if told to stop before the end."""

    def epoch_at(self, step: int) -> float:
        """Passes over the training data after `step` steps."""

    def notes(self) -> list[str]:
        """What the user should know of the data after training on it, a line each."""

    def close(self) -> None:
        """Let go of what the data needed; nothing is asked for afterwards."""

    def description(self) -> dict[str, Any]:
        """What a checkpoint must know of the data: JSON values, with `fingerprint` for its content."""
