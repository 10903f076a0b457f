"""A GPT in plain PyTorch, written like nanoGPT, for the baseline of `asgo bench train`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipelines.config import GPTSettings

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
