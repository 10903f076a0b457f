"""Pretraining in plain PyTorch, as a short script does it: the baseline of `asgo bench train`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from pipelines.benchmarks import plain_track3
from pipelines.benchmarks.plain_gpt import PlainGPT
from pipelines.benchmarks.plain_llama import PlainLlama
from pipelines.benchmarks.plain_track3 import PlainTrack3
from pipelines.benchmarks.trainers import end_lap
from pipelines.config import DecoderSettings, GPTRunConfig, GPTSettings, TransformerSettings
from pipelines.data.tokenizers import Tokens
from pipelines.errors import UsageError
from pipelines.hf import llama
from pipelines.training.clock import Lap, StepClock
from pipelines.training.device import compiles

_LR, _BETAS, _WEIGHT_DECAY = 6e-4, (0.9, 0.95), 0.1  # nanoGPT's for GPT-2 124 M


def plain_model(settings: DecoderSettings, vocab_size: int) -> nn.Module:
    """Return the decoder in plain PyTorch, as it is usually written; its `forward` returns the loss.

    `vocab_size` includes the padding. Raises `UsageError` if there is none with these parts.
    """
    if isinstance(settings, GPTSettings):
        return PlainGPT(settings, vocab_size)
    if not isinstance(settings, TransformerSettings):
        raise UsageError(f"there is no plain model of kind {settings.kind}")
    if not plain_track3.other_parts(settings):
        return PlainTrack3(settings, vocab_size)
    other = llama.other_parts(settings)
    if other:
        raise UsageError(f"there is no plain model with {', '.join(other)}")
    return PlainLlama(settings, vocab_size)


class PlainTrainer:
    """Training steps with fused AdamW. Fetches the next batch while the device computes."""

    def __init__(self, config: GPTRunConfig, tokens: Tokens, vocab_size: int, device: torch.device, dtype: torch.dtype):
        """Uses only the model, the batch, the clipping and `compile` of `config`; raises like `plain_model`."""
        training = config.training
        self._rows = training.micro_batch_size or training.batch_size
        self._parts = training.batch_size // self._rows
        self._max_grad_norm = training.max_grad_norm
        self._context_length = config.model.context_length
        self._tokens, self._device, self._dtype = tokens, device, dtype
        self._model = plain_model(config.model, vocab_size).to(device)
        decayed = [param for param in self._model.parameters() if param.ndim >= 2]
        others = [param for param in self._model.parameters() if param.ndim < 2]
        groups = [{"params": decayed, "weight_decay": _WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=_LR, betas=_BETAS, fused=True)
        if compiles(config.runtime, device):
            self._model.compile()
        self._clock = StepClock(device)
        self._next = self._batch()

    def step(self) -> Lap:
        """Make one update from one global batch; wait for the device."""
        self._clock.run()
        for _ in range(self._parts):
            with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
                loss = self._model(*self._next) / self._parts
            self._next = self._batch()
            loss.backward()
        if self._max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._max_grad_norm)
        with self._clock.optimizer():
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return end_lap(self._clock)

    def _batch(self) -> tuple[Tensor, Tensor]:
        """Return inputs and targets at random positions: int64, (rows, context_length)."""
        starts = torch.randint(len(self._tokens) - self._context_length, (self._rows,)).tolist()
        windows = np.stack([self._tokens[start : start + self._context_length + 1] for start in starts])
        inputs, targets = (torch.from_numpy(part.astype(np.int64)) for part in (windows[:, :-1], windows[:, 1:]))
        if self._device.type == "cuda":
            inputs, targets = inputs.pin_memory(), targets.pin_memory()
        return inputs.to(self._device, non_blocking=True), targets.to(self._device, non_blocking=True)
