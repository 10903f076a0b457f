"""A small vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929), with averages instead of a class token."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from models.norms import LayerNorm

_INIT_STD = 0.02
_FEWEST_PATCHES = 7
_LARGEST_PATCH = 16


class ViT(nn.Module):
    """A pre-norm transformer on patches; the head sees the mean over patches (Beyer et al. 2022, arXiv 2205.01580).

    The defaults are the width, depth and heads of ViT-Ti (Touvron et al. 2021, arXiv 2012.12877): 5.4 million
    parameters.

    Args:
        classes: number of logits.
        channels: channels of the images.
        resolution: height and width of the images, in pixels.
        patch_size: height and width of a patch; `default_patch_size` if None.
        d_model: width of the residual stream.
        n_layers: number of blocks.
        n_heads: number of attention heads; must divide `d_model`.

    Raises:
        ValueError: `patch_size` does not divide `resolution`, or `n_heads` `d_model`.
    """

    def __init__(
        self,
        classes: int,
        channels: int,
        resolution: int,
        *,
        patch_size: int | None = None,
        d_model: int = 192,
        n_layers: int = 12,
        n_heads: int = 3,
    ) -> None:
        super().__init__()
        patch = patch_size or default_patch_size(resolution)
        if resolution % patch:
            raise ValueError(f"patch_size={patch} does not divide the resolution, {resolution}")
        if d_model % n_heads:
            raise ValueError(f"n_heads={n_heads} does not divide d_model={d_model}")
        self.patches = nn.Conv2d(channels, d_model, kernel_size=patch, stride=patch)
        self.position_embedding = nn.Embedding((resolution // patch) ** 2, d_model)
        self.blocks = nn.ModuleList(_Block(d_model, n_heads) for _ in range(n_layers))
        self.norm = LayerNorm(d_model)
        self.head = nn.Linear(d_model, classes)
        nn.init.normal_(self.position_embedding.weight, std=_INIT_STD)

    def forward(self, images: Tensor) -> Tensor:
        """(batch, channels, resolution, resolution) → (batch, classes)."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.position_embedding.weight
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))  # type: ignore[no-any-return]


def default_patch_size(resolution: int) -> int:
    """Return the largest divisor of the resolution that is at most 1/7 of it and 16: 4 for 28 and 32, 16 for 224."""
    most = max(1, min(resolution // _FEWEST_PATCHES, _LARGEST_PATCH))
    return next(size for size in range(most, 0, -1) if resolution % size == 0)


class _Block(nn.Module):
    """Attention and a feed-forward network, each on the normalized input and with a residual connection."""

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self._n_heads = n_heads
        self.attention_norm = LayerNorm(d_model)
        self.query, self.key, self.value, self.output = (_linear(d_model, d_model) for _ in range(4))
        self.feed_forward_norm = LayerNorm(d_model)
        self.feed_forward = nn.Sequential(_linear(d_model, 4 * d_model), nn.GELU(), _linear(4 * d_model, d_model))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, patches, d_model) → the same."""
        normalized = self.attention_norm(x)
        heads = (part(normalized).unflatten(-1, (self._n_heads, -1)).transpose(1, 2) for part in self._projections())
        attended = functional.scaled_dot_product_attention(*heads)
        x = x + self.output(attended.transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.feed_forward_norm(x))  # type: ignore[no-any-return]

    def _projections(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        return self.query, self.key, self.value


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
