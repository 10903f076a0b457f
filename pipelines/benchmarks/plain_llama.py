"""A Llama in plain PyTorch, written like Hugging Face's, for the baseline of `asgo bench train`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipelines.config import TransformerSettings

_INIT_STD = 0.02


class PlainAttention(nn.Module):
    """Causal attention with rotary positions; groups of queries share a head of keys and values."""

    def __init__(self, settings: TransformerSettings) -> None:
        super().__init__()
        width, d_head = settings.d_model, settings.d_model // settings.n_heads
        self.d_head, self.n_groups = d_head, settings.n_kv_heads or settings.n_heads
        self.query, self.output = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.key, self.value = (nn.Linear(width, self.n_groups * d_head, bias=False) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(batch, time, d_model), two tables (time, d_head) → (batch, time, d_model)."""
        query, key, value = (
            part(x).unflatten(2, (-1, self.d_head)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        query, key = ((each * cos + _quarter_turn(each) * sin).type_as(each) for each in (query, key))
        shared = query.shape[1] // self.n_groups
        if shared > 1:
            key, value = (each.repeat_interleave(shared, dim=1) for each in (key, value))
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.output(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def _quarter_turn(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


class PlainFeedForward(nn.Module):
    """Two layers, the first gated by a third with a SiLU."""

    def __init__(self, settings: TransformerSettings) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(settings.d_model, settings.d_ff, bias=False) for _ in range(2))
        self.down = nn.Linear(settings.d_ff, settings.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_model) → (..., d_model)."""
        return self.down(functional.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class PlainBlock(nn.Module):
    """Attention and a feed-forward network with residual connections."""

    def __init__(self, settings: TransformerSettings) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(settings.d_model, settings.norm_eps)
        self.attention = PlainAttention(settings)
        self.feed_forward_norm = nn.RMSNorm(settings.d_model, settings.norm_eps)
        self.feed_forward = PlainFeedForward(settings)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(batch, time, d_model), two tables (time, d_head) → (batch, time, d_model)."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.feed_forward(self.feed_forward_norm(x))  # type: ignore[no-any-return]


class PlainLlama(nn.Module):
    """The same function as a `models.transformer.Transformer` with Llama's parts; parameters have the same names."""

    cos: Tensor
    sin: Tensor

    def __init__(self, settings: TransformerSettings, vocab_size: int) -> None:
        """`vocab_size` includes the padding."""
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, settings.d_model)
        self.blocks = nn.ModuleList(PlainBlock(settings) for _ in range(settings.n_layers))
        self.norm = nn.RMSNorm(settings.d_model, settings.norm_eps)
        self.head = nn.Linear(settings.d_model, vocab_size, bias=False)
        if settings.tied_head:
            self.head.weight = self.token_embedding.weight
        d_head = settings.d_model // settings.n_heads
        frequencies = settings.rotary_base ** -(torch.arange(0, d_head, 2) / d_head)
        angles = torch.outer(torch.arange(settings.context_length), torch.cat([frequencies, frequencies]))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, param in self.named_parameters():
            if param.ndim == 2:
                depth = 2 * settings.n_layers if name.endswith(("output.weight", "down.weight")) else 1
                nn.init.normal_(param, std=_INIT_STD / math.sqrt(depth))

    def logits(self, tokens: Tensor) -> Tensor:
        """(batch, time) integers → (batch, time, vocab_size)."""
        x, time = self.token_embedding(tokens), tokens.shape[1]
        for block in self.blocks:
            x = block(x, self.cos[:time], self.sin[:time])
        return self.head(self.norm(x))  # type: ignore[no-any-return]

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of the next token in nats; two integer tensors (batch, time) → ()."""
        return functional.cross_entropy(self.logits(inputs).flatten(0, 1), targets.flatten())
