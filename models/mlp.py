"""A multilayer perceptron for small images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers with ReLU between them, on flattened images; 784-512-512-10 on MNIST.

    Args:
        classes: number of logits.
        channels: channels of the images.
        resolution: height and width of the images, in pixels.
        widths: widths of the hidden layers.
    """

    def __init__(self, classes: int, channels: int, resolution: int, *, widths: Sequence[int] = (512, 512)) -> None:
        super().__init__()
        sizes = [channels * resolution**2, *widths]
        self.layers = nn.Sequential()
        for inputs, outputs in pairwise(sizes):
            self.layers.extend([nn.Linear(inputs, outputs), nn.ReLU()])
        self.head = nn.Linear(sizes[-1], classes)
        self._inputs = (channels, resolution, resolution)

    def forward(self, images: Tensor) -> Tensor:
        """(batch, channels, resolution, resolution) → (batch, classes). Raises `ValueError` for another size."""
        if images.shape[1:] != self._inputs:
            raise ValueError(f"images of {tuple(images.shape[1:])}, not {self._inputs}")
        return self.head(self.layers(images.flatten(1)))  # type: ignore[no-any-return]
