"""GPT pretraining in plain PyTorch, written like nanoGPT: the baseline of `asgo bench train`."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipelines.benchmarks.trainers import end_lap
from pipelines.config import GPTRunConfig, GPTSettings
from pipelines.data.tokenizers import Tokens
from pipelines.training.clock import Lap, StepClock
from pipelines.training.device import compiles

_LR, _BETAS, _WEIGHT_DECAY = 6e-4, (0.9, 0.95), 0.1  # nanoGPT's for GPT-2 124 M
_INIT_STD = 0.02


class PlainAttention(nn.Module):
    """Causal attention with one fused projection to queries, keys and values."""

    def __init__(self, settings: GPTSettings) -> None:
        super().__init__()
        self.n_heads = settings.n_heads
        self.query_key_value = nn.Linear(settings.d_model, 3 * settings.d_model, bias=settings.bias)
        self.output = nn.Linear(settings.d_model, settings.d_model, bias=settings.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, d_model) → (batch, time, d_model)."""
        batch, time, d_model = x.shape
        query, key, value = (
            part.view(batch, time, self.n_heads, -1).transpose(1, 2) for part in self.query_key_value(x).chunk(3, dim=2)
        )
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.output(attended.transpose(1, 2).reshape(batch, time, d_model))  # type: ignore[no-any-return]


class PlainBlock(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, settings: GPTSettings) -> None:
        super().__init__()
        d_model, bias = settings.d_model, settings.bias
        self.attention_norm = nn.LayerNorm(d_model, bias=bias)
        self.attention = PlainAttention(settings)
        self.feed_forward_norm = nn.LayerNorm(d_model, bias=bias)
        self.up = nn.Linear(d_model, settings.d_ff, bias=bias)
        self.down = nn.Linear(settings.d_ff, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, d_model) → (batch, time, d_model)."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(functional.gelu(self.up(self.feed_forward_norm(x))))  # type: ignore[no-any-return]


class PlainGPT(nn.Module):
    """The same function and initialization as `models.gpt.GPT` without dropout; `forward` returns the loss."""

    def __init__(self, settings: GPTSettings, vocab_size: int) -> None:
        """`vocab_size` includes the padding."""
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, settings.d_model)
        self.position_embedding = nn.Embedding(settings.context_length, settings.d_model)
        self.blocks = nn.ModuleList(PlainBlock(settings) for _ in range(settings.n_layers))
        self.norm = nn.LayerNorm(settings.d_model, bias=settings.bias)
        self.head = nn.Linear(settings.d_model, vocab_size, bias=False)
        if settings.tied_head:
            self.head.weight = self.token_embedding.weight
        for name, param in self.named_parameters():
            if param.ndim == 2:
                depth = 2 * settings.n_layers if name.endswith(("output.weight", "down.weight")) else 1
                nn.init.normal_(param, std=_INIT_STD / math.sqrt(depth))
            elif name.endswith("bias"):
                nn.init.zeros_(param)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of the next token in nats; two integer tensors (batch, time) → ()."""
        positions = torch.arange(inputs.shape[1], device=inputs.device)
        x = self.token_embedding(inputs) + self.position_embedding(positions)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class PlainTrainer:
    """Training steps with fused AdamW. Fetches the next batch while the device computes."""

    def __init__(self, config: GPTRunConfig, tokens: Tokens, vocab_size: int, device: torch.device, dtype: torch.dtype):
        """Uses only the model's shape, the batch, the clipping and `compile` of `config`."""
        training = config.training
        self._rows = training.micro_batch_size or training.batch_size
        self._parts = training.batch_size // self._rows
        self._max_grad_norm = training.max_grad_norm
        self._context_length = config.model.context_length
        self._tokens, self._device, self._dtype = tokens, device, dtype
        self._model = PlainGPT(config.model, vocab_size).to(device)
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
