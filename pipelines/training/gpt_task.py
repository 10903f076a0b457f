"""GPT pretraining as a task of the training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.gpt import GPT, next_token_loss
from pipelines.config import GPTRunConfig, GPTSettings
from pipelines.data.batches import TrainingBatches, open_token_data, validation_batches
from pipelines.training.device import autocast, pick_precision
from pipelines.training.task import Batch


def build_gpt(settings: GPTSettings, vocab_size: int) -> GPT:
    """A freshly initialized decoder for a vocabulary, which is padded as the settings say."""
    multiple = settings.vocab_multiple
    padded = -(-vocab_size // multiple) * multiple
    return GPT(vocab_size=padded, **settings.model_dump(exclude={"vocab_multiple"}))


class GPTTask:
    """Token windows, a decoder, and the mean cross-entropy of the next token in nats."""

    def __init__(self, config: GPTRunConfig, device: torch.device) -> None:
        training = config.training
        self.data = open_token_data(Path(config.data.folder))
        # Only a copy from pinned memory runs beside the work that is already queued on the GPU.
        self._pinned = device.type == "cuda"
        self.batches = TrainingBatches(
            self.data, config.model.context_length, training.batch_size, config.seed, pinned=self._pinned
        )
        self.model = build_gpt(config.model, self.data.vocab_size).to(device)
        self.tokens_per_sample = config.model.context_length
        self._micro_batch_size = training.micro_batch_size or training.batch_size
        self._batch_size = training.batch_size
        self._evaluation_batches = config.evaluation.batches
        self._device = device
        self._dtype = pick_precision(training, device)

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """(inputs, targets), each (micro_batch_size, context_length) int64."""
        for start in range(0, self._batch_size, self._micro_batch_size):
            yield self.batches.batch(step, slice(start, start + self._micro_batch_size))

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy of a micro-batch, shape ()."""
        inputs, targets = (part.to(self._device, non_blocking=True) for part in batch)
        with autocast(self._device, self._dtype):
            logits = self.model(inputs)
        return next_token_loss(logits, targets)

    def training_figures(self) -> dict[str, float]:
        """None."""
        return {}

    @torch.no_grad()
    def evaluate(self, should_stop: Callable[[], bool]) -> dict[str, float] | None:
        """The mean loss over the validation windows; None if told to stop before the end."""
        total, count = torch.zeros((), dtype=torch.float64), 0
        total = total if self._device.type == "mps" else total.to(self._device)  # MPS has no float64
        self.model.eval()
        for batch in validation_batches(
            self.data, self.tokens_per_sample, self._micro_batch_size, self._evaluation_batches, pinned=self._pinned
        ):
            if should_stop():
                self.model.train()
                return None
            total += self.loss(batch).to(total.device) * len(batch[0])
            count += len(batch[0])
        self.model.train()
        return {"loss": total.item() / count}

    def epoch_at(self, step: int) -> float:
        """Passes over the training windows after `step` steps."""
        return self.batches.epoch_at(step)

    def notes(self) -> list[str]:
        """None."""
        return []

    def close(self) -> None:
        """Nothing: the shards are only mapped."""

    def description(self) -> dict[str, Any]:
        """The data's fingerprint and tokenizer: enough to generate text from a checkpoint alone."""
        return {"fingerprint": self.data.fingerprint, "tokenizer": self.data.tokenizer}
