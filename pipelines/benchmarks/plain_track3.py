"""Track 3's model in plain PyTorch, from its description: for `asgo bench train`, and to test ours."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipelines.config import TransformerSettings
from pipelines.resolve import read_preset

_FREE = ("context_length", "n_layers", "n_heads", "d_model", "d_ff", "attention_scale", "norm_eps", "vocab_multiple")
"""Settings that a smaller twin of the model may have."""


def other_parts(settings: TransformerSettings) -> list[str]:
    """Return `key=value` for each setting with which the model is not track 3's."""
    own, track3 = settings.model_dump(), TransformerSettings(**read_preset("track3")["model"]).model_dump()
    return [f"model.{key}={own[key]}" for key, value in track3.items() if key not in _FREE and own[key] != value]


class PlainNorm(nn.Module):
    """RMS normalization with a gain, in the dtype of its input."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) → (..., width)."""
        return functional.rms_norm(x, x.shape[-1:], self.weight.type_as(x), self.eps).type_as(x)


class PlainAttention(nn.Module):
    """Causal attention with normalized queries and keys, of which half the pairs turn."""

    def __init__(self, settings: TransformerSettings) -> None:
        super().__init__()
        width = settings.d_model
        self.n_heads, self.scale, self.eps = settings.n_heads, settings.attention_scale, settings.norm_eps
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(batch, time, d_model), two tables (time, d_head / 2) → (batch, time, d_model)."""
        query, key, value = (
            part(x).unflatten(2, (self.n_heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        query, key = (self._turned(each, cos, sin) for each in (query, key))
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scale)
        return self.output(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = functional.rms_norm(x, x.shape[-1:], eps=self.eps).type_as(x).chunk(2, dim=-1)
        return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1).type_as(x)


class PlainFeedForward(nn.Module):
    """Two layers with relu² between them."""

    def __init__(self, settings: TransformerSettings) -> None:
        super().__init__()
        self.up = nn.Linear(settings.d_model, settings.d_ff)
        self.down = nn.Linear(settings.d_ff, settings.d_model)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_model) → (..., d_model)."""
        return self.down(self.up(x).relu().square())  # type: ignore[no-any-return]


class PlainBlock(nn.Module):
    """Attention and a feed-forward network with residual connections."""

    def __init__(self, settings: TransformerSettings) -> None:
        super().__init__()
        self.attention_norm = PlainNorm(settings.d_model, settings.norm_eps)
        self.attention = PlainAttention(settings)
        self.feed_forward_norm = PlainNorm(settings.d_model, settings.norm_eps)
        self.feed_forward = PlainFeedForward(settings)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(batch, time, d_model), two tables (time, d_head / 2) → (batch, time, d_model)."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.feed_forward(self.feed_forward_norm(x))  # type: ignore[no-any-return]


class PlainTrack3(nn.Module):
    """The model of the benchmark with its initialization; parameters have the names of `models.transformer`'s."""

    cos: Tensor
    sin: Tensor

    def __init__(self, settings: TransformerSettings, vocab_size: int) -> None:
        """`vocab_size` includes the padding. Only sizes, `attention_scale` and `norm_eps` of the settings are used."""
        super().__init__()
        width, eps = settings.d_model, settings.norm_eps
        self.token_embedding = nn.Embedding(vocab_size, width, dtype=torch.bfloat16)
        self.embedding_norm = PlainNorm(width, eps)
        self.blocks = nn.ModuleList(PlainBlock(settings) for _ in range(settings.n_layers))
        self.norm = PlainNorm(width, eps)
        self.head = nn.Linear(width, vocab_size)
        quarter = width // settings.n_heads // 4
        frequencies = torch.cat([(1 / 1024) ** torch.linspace(0, 1, quarter), torch.zeros(quarter)])
        angles = torch.outer(torch.arange(settings.context_length), frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, param in self.named_parameters():
            if name.endswith(("bias", "output.weight", "down.weight", "head.weight")):
                nn.init.zeros_(param)
            elif param.ndim == 2:
                nn.init.normal_(param, std=1.0 if "embedding" in name else math.sqrt(0.33 / param.shape[1]))

    def logits(self, tokens: Tensor) -> Tensor:
        """(batch, time) integers → (batch, time, vocab_size), float32."""
        x = self.token_embedding(tokens)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.type_as(self.head.weight)
        x = self.embedding_norm(x)
        time = tokens.shape[1]
        for block in self.blocks:
            x = block(x, self.cos[:time], self.sin[:time])
        z = self.head(self.norm(x)).float()
        return 15 * z / (z.square() + 15**2).sqrt()  # type: ignore[no-any-return]

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of the next token in nats; two integer tensors (batch, time) → ()."""
        return functional.cross_entropy(self.logits(inputs).flatten(0, 1), targets.flatten())
