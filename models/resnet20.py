"""ResNet-20 for CIFAR (He et al. 2015, arXiv 1512.03385, section 4.2)."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional

_BLOCKS = 3
_WIDTHS = (16, 32, 64)


class ResNet20(nn.Module):
    """Three stages of 16, 32 and 64 channels with three blocks each; 0.27 million parameters.

    Shortcuts are identities without parameters (option A): between stages, every second pixel, and zeros for the new
    channels. Kernels are initialized as in He et al. 2015, arXiv 1502.01852.

    Args:
        classes: number of logits.
        channels: channels of the images.
        resolution: not used: the model takes images of any size.
    """

    def __init__(self, classes: int, channels: int, resolution: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, _WIDTHS[0], kernel_size=3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(_WIDTHS[0])
        widths = [width for width in _WIDTHS for _ in range(_BLOCKS)]
        self.blocks = nn.Sequential(*(_Block(*sizes) for sizes in pairwise([_WIDTHS[0], *widths])))
        self.head = nn.Linear(_WIDTHS[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """(batch, channels, height, width) → (batch, classes)."""
        x = self.blocks(functional.relu(self.norm(self.stem(images))))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class _Block(nn.Module):
    """Two convolutions; the first halves the resolution if it changes the number of channels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self._stride = 1 if inputs == outputs else 2
        self._new_channels = outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, kernel_size=3, stride=self._stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, kernel_size=3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, inputs, height, width) → (batch, outputs, height / stride, width / stride), rounded up."""
        inner = functional.relu(self.norm1(self.conv1(x)))
        shortcut = functional.pad(x[:, :, :: self._stride, :: self._stride], (0, 0, 0, 0, 0, self._new_channels))
        return functional.relu(self.norm2(self.conv2(inner)) + shortcut)
