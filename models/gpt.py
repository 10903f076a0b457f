"""A pre-norm transformer decoder, as in GPT-2."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.cache import KeyValueCache, LayerCache
from models.chunked_loss import chunked_cross_entropy
from models.norms import LayerNorm

_INIT_STD = 0.02
Gelu = Literal["exact", "tanh"]


class CausalSelfAttention(nn.Module):
    """Multi-head attention to earlier positions, with separate query, key and value projections."""

    def __init__(self, d_model: int, n_heads: int, bias: bool, dropout: float) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.dropout = dropout
        self.query = nn.Linear(d_model, d_model, bias=bias)
        self.key = nn.Linear(d_model, d_model, bias=bias)
        self.value = nn.Linear(d_model, d_model, bias=bias)
        self.output = nn.Linear(d_model, d_model, bias=bias)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        """(batch, time, d_model) → the same; attends to the positions in the cache too, and adds to it."""
        queries, keys, values = (self._split_heads(part(x)) for part in (self.query, self.key, self.value))
        is_first = cache is None or cache.length == 0
        if cache is not None:
            keys, values = cache.extend(keys, values)
        attended = functional.scaled_dot_product_attention(
            queries,
            keys,
            values,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_first,  # later calls have one query, which sees every key
        )
        return self.output(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _split_heads(self, x: Tensor) -> Tensor:
        """(batch, time, d_model) → (batch, heads, time, d_head)."""
        batch, time, d_model = x.shape
        return x.view(batch, time, self.n_heads, d_model // self.n_heads).transpose(1, 2)


class FeedForward(nn.Sequential):
    """Two layers with a GELU between them; (..., d_model) → (..., d_model)."""

    def __init__(self, d_model: int, d_ff: int, bias: bool, gelu: Gelu) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, d_ff, bias=bias)
        self.gelu = nn.GELU("tanh" if gelu == "tanh" else "none")
        self.down = nn.Linear(d_ff, d_model, bias=bias)


class Block(nn.Module):
    """Attention and a feed-forward network, each on the normalized input and with a residual connection."""

    def __init__(self, d_model: int, n_heads: int, d_ff: int, bias: bool, dropout: float, gelu: Gelu) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(d_model, bias=bias)
        self.attention = CausalSelfAttention(d_model, n_heads, bias, dropout)
        self.feed_forward_norm = LayerNorm(d_model, bias=bias)
        self.feed_forward = FeedForward(d_model, d_ff, bias, gelu)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        """(batch, time, d_model) → (batch, time, d_model)."""
        x = x + self.dropout(self.attention(self.attention_norm(x), cache))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))  # type: ignore[no-any-return]


class GPT(nn.Module):
    """A decoder that predicts the next token, with learned position embeddings.

    Args:
        vocab_size: number of symbols, including padding.
        context_length: maximal sequence length in tokens.
        n_layers: number of blocks.
        n_heads: number of attention heads; must divide `d_model`.
        d_model: width of the residual stream.
        d_ff: hidden width of the feed-forward networks.
        bias: whether linear layers and normalizations have biases.
        tied_head: whether the output head shares its weight with the token embedding.
        dropout: dropout rate of embeddings, attention weights and residual branches.
        gelu: `exact`, or the approximation `tanh` of the published GPT-2.

    Raises:
        ValueError: `n_heads` does not divide `d_model`.

    Initialization as in GPT-2: normal with standard deviation 0.02, divided by √(2 · n_layers) for layers that write to
    the residual stream; biases are zero.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        context_length: int,
        n_layers: int,
        n_heads: int,
        d_model: int,
        d_ff: int,
        bias: bool = True,
        tied_head: bool = True,
        dropout: float = 0.0,
        gelu: Gelu = "exact",
    ) -> None:
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"n_heads={n_heads} does not divide d_model={d_model}")
        self.context_length = context_length
        self.token_embedding = nn.Embedding(vocab_size, d_model)
        self.position_embedding = nn.Embedding(context_length, d_model)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(d_model, n_heads, d_ff, bias, dropout, gelu) for _ in range(n_layers))
        self.norm = LayerNorm(d_model, bias=bias)
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        if tied_head:
            self.head.weight = self.token_embedding.weight
        self._initialize()

    def forward(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Logits of the next token: (batch, time) integers → (batch, time, vocab_size).

        With a cache, `tokens` follow those of earlier calls; see `KeyValueCache`.
        """
        start = 0 if cache is None else cache.length
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        x = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))
        for index, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache.layers[index])
        return self.head(self.norm(x))  # type: ignore[no-any-return]

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
        return {
            f"{name}.{part}.weight": module.n_heads
            for name, module in self.named_modules()
            if isinstance(module, CausalSelfAttention)
            for part in ("query", "key")
        }

    def _initialize(self) -> None:
        residual_std = _INIT_STD / math.sqrt(2 * len(self.blocks))
        for name, param in self.named_parameters():
            if name.endswith((".output.weight", ".down.weight")):
                nn.init.normal_(param, std=residual_std)
            elif param.ndim == 2:
                nn.init.normal_(param, std=_INIT_STD)
            elif name.endswith("bias"):
                nn.init.zeros_(param)


def next_token_loss(logits: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
    """Return the mean cross-entropy in nats, computed in float32; (batch, time, vocab_size), (batch, time) → ().

    Adds `z_loss` times the mean of the squared logarithm of the softmax's denominator, which keeps logits from
    drifting (PaLM, arXiv 2204.02311, section 5). Targets of -100 are ignored.

    On a GPU, no float32 copy of the logits is kept: compiled, the casts are in the kernels; else it works in chunks.
    """
    if logits.is_cuda and not torch.compiler.is_compiling():
        return chunked_cross_entropy(logits.flatten(0, 1), targets.flatten(), z_loss)
    logits = logits.float().flatten(0, 1)
    loss = functional.cross_entropy(logits, targets.flatten())
    return loss + z_loss * logits.logsumexp(-1).square().mean() if z_loss else loss


@torch.no_grad()
def sample(
    model: nn.Module,
    prompt: Tensor,
    *,
    context_length: int,
    new_tokens: int,
    vocab_size: int,
    temperature: float,
    top_k: int | None,
    generator: torch.Generator,
) -> Tensor:
    """Continue a prompt by sampling from a decoder; (time,) → (time + new_tokens,), on the prompt's device.

    Samples only from the first `vocab_size` symbols, because a vocabulary may be padded. Temperature 0 selects the most
    likely token. The model gets the last `context_length` tokens. `generator` is on the CPU, so a seed gives the same
    text on any device, up to rounding.

    A model with `new_cache` gets each token once, as long as all tokens fit into its context. Then the window slides,
    and every step computes the whole window: the kept keys and values of its tokens depend on tokens that left it.
    """
    tokens = prompt
    capacity = min(len(prompt) + new_tokens, context_length)
    cache: KeyValueCache | None = model.new_cache(capacity) if hasattr(model, "new_cache") else None  # type: ignore[operator]
    for _ in range(new_tokens):
        if cache is not None and len(tokens) <= context_length:
            logits = model(tokens[None, cache.length :], cache)
        else:
            logits = model(tokens[None, -context_length:])
        logits = logits[0, -1, :vocab_size].float().cpu()
        tokens = torch.cat([tokens, _draw(logits, temperature, top_k, generator).to(tokens.device)])
    return tokens


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits.argmax(keepdim=True)
    if top_k is not None and top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    # The maximum becomes 0, so that no temperature can turn it into infinity or NaN.
    limits = torch.finfo(logits.dtype)
    scaled = (logits - logits.max()) / min(max(temperature, limits.tiny), limits.max)
    return torch.multinomial(scaled.softmax(-1), 1, generator=generator)
