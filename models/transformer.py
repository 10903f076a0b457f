"""A pre-norm transformer decoder of chosen parts: Llama, the models of modded-nanogpt, and what lies between them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.cache import KeyValueCache, LayerCache
from models.norms import LayerNorm, RMSNorm, rms_norm

Norm = Literal["rms", "layer"]
Positions = Literal["rotary", "learned"]
RotaryStyle = Literal["half", "interleaved"]
Mlp = Literal["swiglu", "geglu", "gelu", "relu2"]
SoftcapForm = Literal["sqrt", "tanh"]
Init = Literal["gpt2", "track3", "width-scaled"]

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of the rotary angles, each (time, d_head / 2), float32."""


@dataclass(frozen=True)
class TransformerConfig:
    """Dimensions and parts of a `Transformer`.

    Raises `ValueError` if `n_heads` does not divide `d_model`, `n_kv_heads` not `n_heads`, or rotary heads are odd.
    """

    vocab_size: int
    """Number of symbols, including padding."""
    context_length: int
    """Maximal sequence length in tokens."""
    n_layers: int
    n_heads: int
    n_kv_heads: int
    """Number of key and value heads, each shared by `n_heads / n_kv_heads` queries (arXiv 2305.13245)."""
    d_model: int
    d_ff: int
    """Hidden width of the feed-forward networks."""
    norm: Norm
    norm_gain: bool
    norm_eps: float
    embedding_norm: bool
    """Whether the embedded tokens are normalized."""
    positions: Positions
    rotary_fraction: float
    rotary_base: float
    rotary_endpoint: bool
    rotary_style: RotaryStyle
    rotary_clockwise: bool
    qk_norm: bool
    """Whether queries and keys have an RMS of 1 in every head, before the rotation."""
    attention_scale: float | None
    """Factor of the attention scores; None is 1 / √d_head."""
    mlp: Mlp
    bias: bool
    """Whether all linear layers, the head too, and layer norms have biases."""
    tied_head: bool
    """Whether the head has the weight of the token embedding."""
    softcap: float
    """Bound c of the logits; 0 for none."""
    softcap_form: SoftcapForm
    """Logits `z` become c · z / √(z² + c²) (`sqrt`), or c · tanh(z / c) (`tanh`, as in Gemma 2)."""
    init: Init
    embedding_dtype: Literal["float32", "bfloat16"]
    dropout: float
    """Dropout rate of embeddings, attention weights and residual branches."""

    def __post_init__(self) -> None:
        if self.d_model % self.n_heads:
            raise ValueError(f"n_heads={self.n_heads} does not divide d_model={self.d_model}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads={self.n_kv_heads} does not divide n_heads={self.n_heads}")
        if self.positions == "rotary" and self.d_head % 2:
            raise ValueError(f"rotary positions need an even head size, not d_model / n_heads = {self.d_head}")

    @property
    def d_head(self) -> int:
        """Size of a head."""
        return self.d_model // self.n_heads


def _norm(config: TransformerConfig) -> nn.Module:
    if config.norm == "rms":
        return RMSNorm(config.d_model, config.norm_eps, config.norm_gain)
    return LayerNorm(config.d_model, config.norm_eps, config.norm_gain, config.bias)


class Rotary(nn.Module):
    """Tables of rotary position embeddings (RoFormer, arXiv 2104.09864).

    The first `rotary_fraction` of a head's n pairs turn, pair i by `base^(-i / n)` radians a position; with
    `rotary_endpoint`, by `base^(-i / (n - 1))`, so that the slowest turns by exactly 1 / base. The other pairs stay.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        pairs = config.d_head // 2
        turning = round(config.rotary_fraction * pairs)
        steps = max(turning - 1, 1) if config.rotary_endpoint else turning
        # In float64: a float32 angle of 1,000 radians is wrong by 6e-5.
        exponents = torch.arange(turning, dtype=torch.float64) / steps
        frequencies = functional.pad(config.rotary_base**-exponents, (0, pairs - turning))
        angles = torch.outer(torch.arange(config.context_length, dtype=torch.float64), frequencies)
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", (-angles if config.rotary_clockwise else angles).sin().float(), persistent=False)

    def forward(self, start: int, time: int) -> Rotation:
        """Return the rotation of `time` positions from `start` on."""
        return self.cos[start : start + time], self.sin[start : start + time]


def rotate(x: Tensor, rotation: Rotation, style: RotaryStyle) -> Tensor:
    """Rotate the pairs of each head in float32; (batch, heads, time, d_head) → the same shape and dtype.

    A pair is elements i and i + d_head / 2 (`half`, as in Hugging Face's Llama), or 2i and 2i + 1 (`interleaved`, as in
    RoFormer and Meta's Llama).
    """
    cos, sin = rotation
    shape, dim = ((2, -1), -2) if style == "half" else ((-1, 2), -1)
    first, second = x.reshape(*x.shape[:-1], *shape).unbind(dim)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.stack(turned, dim).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Attention to earlier positions; groups of queries share a head of keys and values."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        kv_width = config.n_kv_heads * config.d_head
        self.query = nn.Linear(config.d_model, config.d_model, bias=config.bias)
        self.key = nn.Linear(config.d_model, kv_width, bias=config.bias)
        self.value = nn.Linear(config.d_model, kv_width, bias=config.bias)
        self.output = nn.Linear(config.d_model, config.d_model, bias=config.bias)

    def forward(self, x: Tensor, rotation: Rotation | None = None, cache: LayerCache | None = None) -> Tensor:
        """(batch, time, d_model) → the same; attends to the positions in the cache too, and adds to it."""
        config = self.config
        queries, keys, values = (self._split_heads(part(x)) for part in (self.query, self.key, self.value))
        if config.qk_norm:
            queries, keys = (rms_norm(each, None, config.norm_eps) for each in (queries, keys))
        if rotation is not None:
            queries, keys = (rotate(each, rotation, config.rotary_style) for each in (queries, keys))
        is_first = cache is None or cache.length == 0
        if cache is not None:
            keys, values = cache.extend(keys, values)
        if config.n_kv_heads < config.n_heads:
            # Not `enable_gqa`: the fused float32 kernel of GPUs does not have it.
            keys, values = (each.repeat_interleave(config.n_heads // config.n_kv_heads, 1) for each in (keys, values))
        attended = functional.scaled_dot_product_attention(
            queries,
            keys,
            values,
            dropout_p=config.dropout if self.training else 0.0,
            is_causal=is_first,  # later calls have one query, which sees every key
            scale=config.attention_scale,
        )
        return self.output(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _split_heads(self, x: Tensor) -> Tensor:
        """(batch, time, heads · d_head) → (batch, heads, time, d_head)."""
        batch, time, _ = x.shape
        return x.view(batch, time, -1, self.config.d_head).transpose(1, 2)


class FeedForward(nn.Module):
    """Two layers with a nonlinearity between them, which a third may gate (arXiv 2002.05202).

    Computes `down(f(up(x)))` with f the exact GELU or relu² (arXiv 2109.08668), or `down(f(gate(x)) · up(x))` with f
    the SiLU (`swiglu`) or the exact GELU (`geglu`).
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.mlp = config.mlp
        if self.mlp in ("swiglu", "geglu"):
            self.gate = nn.Linear(config.d_model, config.d_ff, bias=config.bias)
        self.up = nn.Linear(config.d_model, config.d_ff, bias=config.bias)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_model) → (..., d_model)."""
        match self.mlp:
            case "swiglu":
                hidden = functional.silu(self.gate(x)) * self.up(x)
            case "geglu":
                hidden = functional.gelu(self.gate(x)) * self.up(x)
            case "gelu":
                hidden = functional.gelu(self.up(x))
            case "relu2":
                hidden = functional.relu(self.up(x)).square()
        return self.down(hidden)  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and a feed-forward network, each on the normalized input and with a residual connection."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = _norm(config)
        self.attention = Attention(config)
        self.feed_forward_norm = _norm(config)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotation: Rotation | None = None, cache: LayerCache | None = None) -> Tensor:
        """(batch, time, d_model) → (batch, time, d_model)."""
        x = x + self.dropout(self.attention(self.attention_norm(x), rotation, cache))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """A decoder that predicts the next token."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(
            config.vocab_size, config.d_model, dtype=getattr(torch, config.embedding_dtype)
        )
        if config.positions == "rotary":
            self.rotary = Rotary(config)
        else:
            self.position_embedding = nn.Embedding(config.context_length, config.d_model)
        self.embedding_norm = _norm(config) if config.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = _norm(config)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        # Not in the head: to optimizers it is a vector, like all biases, and not a part of the head.
        self.head_bias = nn.Parameter(torch.zeros(config.vocab_size)) if config.bias else None
        if config.tied_head:
            self.head.weight = self.token_embedding.weight
        self._initialize()

    def forward(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Logits of the next token: (batch, time) integers → (batch, time, vocab_size).

        With a cache, `tokens` follow those of earlier calls; see `KeyValueCache`.
        """
        start, time = 0 if cache is None else cache.length, tokens.shape[1]
        x = self.token_embedding(tokens)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.head.weight.dtype)  # autocast leaves a bfloat16 residual stream as it is
        rotation = None
        if self.config.positions == "rotary":
            rotation = self.rotary(start, time)
        else:
            x = x + self.position_embedding(torch.arange(start, start + time, device=tokens.device))
        x = self.dropout(self.embedding_norm(x))
        for index, block in enumerate(self.blocks):
            x = block(x, rotation, None if cache is None else cache.layers[index])
        logits = functional.linear(self.norm(x), self.head.weight, self.head_bias)
        return self._capped(logits) if self.config.softcap else logits

    def new_cache(self, capacity: int) -> KeyValueCache:
        """Return an empty cache for `capacity` positions, at most `context_length`."""
        return KeyValueCache(len(self.blocks), capacity)

    def get_output_embeddings(self) -> nn.Linear:
        """Return the output head; the method has the name used by Hugging Face models."""
        return self.head

    def attention_row_blocks(self) -> dict[str, int]:
        """Return the number of heads of query and key weights, by parameter name; a head is a block of `d_head` rows.

        Matrix optimizers can treat each block as a separate matrix (arXiv 2503.20762).
        """
        heads = {"query": self.config.n_heads, "key": self.config.n_kv_heads}
        return {
            f"blocks.{index}.attention.{part}.weight": count
            for index in range(self.config.n_layers)
            for part, count in heads.items()
        }

    def _capped(self, logits: Tensor) -> Tensor:
        """Bound logits of any dtype, in float32."""
        bound, logits = self.config.softcap, logits.float()
        if self.config.softcap_form == "tanh":
            return bound * torch.tanh(logits / bound)
        return bound * logits * (logits.square() + bound**2).rsqrt()

    def _initialize(self) -> None:
        for name, param in self.named_parameters():
            if param.ndim == 2:
                nn.init.normal_(param, std=self._std(name, fan_in=param.shape[1]))
            elif name.endswith("bias"):
                nn.init.zeros_(param)

    def _std(self, name: str, fan_in: int) -> float:
        """Return the standard deviation of the initial elements of a matrix.

        - `gpt2`: 0.02; divided by √(2 · n_layers) for matrices that write to the residual stream.
        - `track3`, as in track 3 of modded-nanogpt: 1 for embeddings; 0 for the head and matrices that write to the
          residual stream; √(0.33 / fan_in) for the others.
        - `width-scaled`, the initial variances of μP (arXiv 2203.03466, table 3): 1 for embeddings, 1 / fan_in for the
          head, 1 / √fan_in for the others, of which those that write to the residual stream are divided by √(2 ·
          n_layers). It does not scale learning rates.
        """
        residual = name.endswith((".output.weight", ".down.weight"))
        depth = math.sqrt(2 * self.config.n_layers) if residual else 1.0
        is_embedding, is_head = "embedding" in name, name == "head.weight"
        match self.config.init:
            case "gpt2":
                return 0.02 / depth
            case "track3":
                return 1.0 if is_embedding else 0.0 if residual or is_head else math.sqrt(0.33 / fan_in)
            case "width-scaled":
                return 1.0 if is_embedding else 1 / fan_in if is_head else 1 / (math.sqrt(fan_in) * depth)
