"""GPT pretraining as a task of the training loop."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.gpt import next_token_loss
from pipelines.config import DecoderSettings, GPTRunConfig
from pipelines.data.batches import TrainingBatches, ValidationBatches, open_token_data
from pipelines.errors import AsgoError, UsageError
from pipelines.hf.initial_model import refuse_other_vocabulary
from pipelines.hf.initial_weights import load_initial_weights
from pipelines.tensors import Tensors, require_same_names
from pipelines.training.device import autocast, compiles, memory_bytes, pick_precision
from pipelines.training.distributed import ALONE, Ranks, local_batch, rounds
from pipelines.training.parallel import place_model
from pipelines.training.task import Batch

_IGNORED = -100
"""Target of a position without a token, which the cross-entropy ignores."""


def build_decoder(settings: DecoderSettings, vocab_size: int) -> nn.Module:
    """Return a newly initialized decoder; the settings say how the vocabulary is padded.

    Raises `UsageError` if its weights do not fit in this machine's memory.
    """
    size = 4 * settings.parameters(vocab_size)
    if size > memory_bytes():
        raise UsageError(f"model: its weights take {size / 2**30:,.0f} GiB, more than this machine's memory")
    return settings.build(vocab_size)


@functools.cache
def count_parameters(settings: DecoderSettings, vocab_size: int) -> int:
    """Return the number of parameters of a decoder, a tied weight once. Builds it on the meta device, without memory.

    Raises `UsageError` like `build_decoder`.
    """
    with torch.device("meta"):
        return sum(param.numel() for param in build_decoder(settings, vocab_size).parameters())


def require_weights_of(settings: DecoderSettings, vocab_size: int, tensors: Tensors, source: str) -> None:
    """Raise `AsgoError` unless names and shapes of the weights match a decoder with these settings.

    Call it before building the decoder: untrusted settings could make it arbitrarily large.
    """
    n_layers = getattr(settings, "n_layers", 0)
    if n_layers > len(tensors):
        raise AsgoError(f"{source}: of another model: {len(tensors):,} weights for n_layers={n_layers}")
    try:
        with torch.device("meta"):
            own = build_decoder(settings, vocab_size)
    except (RuntimeError, ValueError, OverflowError, TypeError):  # sizes beyond 64 bits
        raise AsgoError(f"{source}: of another model: its settings are not those of a possible model") from None
    require_same_names(dict(own.named_parameters()), tensors, source)


class GPTTask:
    """Token windows, a decoder, and the mean cross-entropy of the next token in nats."""

    def __init__(self, config: GPTRunConfig, device: torch.device, ranks: Ranks = ALONE) -> None:
        """Raises like `open_token_data`, and `UsageError` if the batch does not divide equally among the ranks."""
        training = config.training
        self._config = config
        self._rows = local_batch(training, ranks)
        self.data = open_token_data(Path(config.data.folder))
        self._vocabulary_notes = refuse_other_vocabulary(config, self.data.vocab_size, self.data.tokenizer["name"])
        self.tokens_per_sample = config.model.context_length
        # Only copies from pinned memory overlap with the work that is queued on the GPU.
        pinned = device.type == "cuda"
        self.batches = TrainingBatches(
            self.data,
            self.tokens_per_sample,
            training.batch_size,
            config.seed,
            order=config.data.order,
            pinned=pinned,
        )
        self._validation = ValidationBatches(
            self.data,
            self.tokens_per_sample,
            config.validation_samples,
            from_start=config.evaluation.tokens is not None,
            pinned=pinned,
        )
        self._dtype = pick_precision(training, device)
        model = build_decoder(config.model, self.data.vocab_size)
        if training.activations == "bf16" and self._dtype == torch.bfloat16:
            for embedding in (child for child in model.children() if isinstance(child, nn.Embedding)):
                embedding.register_forward_hook(_in_bfloat16)  # autocast keeps the residual stream as it begins
        self.model = place_model(model, device, ranks, config.runtime, self._dtype)
        self.network: nn.Module = self.model
        # Compiled, it makes no float32 copy of the logits, the largest tensor of all.
        self._compiled = compiles(config.runtime, device)
        self._cross_entropy = torch.compile(next_token_loss, dynamic=False) if self._compiled else next_token_loss
        self._z_loss = getattr(config.model, "z_loss", 0.0)
        self._rows_at_once = self._rows.micro_batch_size
        self._ranks = ranks
        self._device = device

    def load_initial_weights(self) -> list[str]:
        """Load the weights of `init_from`; raises like `pipelines.hf.initial_weights.load_initial_weights`."""
        load_initial_weights(self.model, self._config)
        return self._vocabulary_notes

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """Yield (inputs, targets), each int64 of shape (micro_batch_size, context_length)."""
        for rows in self._rows.micro_batches:
            yield self.batches.batch(step, rows)

    def loss(self, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of a micro-batch, with the model's z-loss, shape ().

        Later validations compute as many windows at once.
        """
        self._rows_at_once = len(batch[0])
        return self._cross_entropy(*self._logits_and_targets(batch), self._z_loss)

    def _logits_and_targets(self, batch: Batch) -> tuple[Tensor, Tensor]:
        inputs, targets = (part.to(self._device, non_blocking=True) for part in batch)
        with autocast(self._device, self._dtype):
            return self.network(inputs), targets

    def probing(self) -> contextlib.AbstractContextManager[None]:
        """Do nothing: there are no metrics."""
        return contextlib.nullcontext()

    def training_metrics(self) -> dict[str, float]:
        """Return no metrics."""
        return {}

    @torch.no_grad()
    def evaluate(self, should_stop: Callable[[], bool]) -> dict[str, float] | None:
        """Return the mean cross-entropy over the validation windows; None if `should_stop` ended it."""
        dtype = torch.float32 if self._device.type == "mps" else torch.float64  # MPS has no float64
        total = torch.zeros((), dtype=dtype, device=self._device)
        self.model.eval()
        for windows in rounds(len(self._validation), self._rows_at_once, self._ranks):
            if should_stop():
                self.model.train()
                return None
            # A rank without windows computes one too, with weight 0: the forward pass of a sharded model is collective.
            batch = self._validation.read(windows or range(1))
            if self._compiled:  # a batch of another shape would be compiled, too
                batch = _padded(batch, self._rows_at_once)
            loss = self._cross_entropy(*self._logits_and_targets(batch))
            total += loss.to(dtype) * len(windows)
        self.model.train()
        return {"loss": self._ranks.sum(total).item() / len(self._validation)}

    def epoch_at(self, step: int) -> float:
        """Return the passes over the training windows after `step` steps."""
        return self.batches.epoch_at(step)

    def notes(self) -> list[str]:
        """Return no notes."""
        return []

    def close(self) -> None:
        """Do nothing: the shards are memory-mapped."""

    def description(self) -> dict[str, Any]:
        """Return the data's fingerprint and its tokenizer, so that a checkpoint alone can generate text."""
        return {"fingerprint": self.data.fingerprint, "tokenizer": self.data.tokenizer}


def _in_bfloat16(embedding: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return output.bfloat16()


def _padded(batch: tuple[Tensor, Tensor], rows: int) -> tuple[Tensor, Tensor]:
    """Append rows that the mean cross-entropy ignores, up to (rows, time)."""
    inputs, targets = batch
    missing = (0, 0, 0, rows - len(inputs))
    return functional.pad(inputs, missing), functional.pad(targets, missing, value=_IGNORED)
