"""ResNet-9 for small images, as in the DAWNBench entries for CIFAR-10 (Page 2018, "How to Train Your ResNet")."""

from __future__ import annotations

from torch import Tensor, nn

_LOGIT_SCALE = 0.125


class ResNet9(nn.Module):
    """Four stages of 64 to 512 channels, two of them with a residual block; 6.6 million parameters.

    The first stage keeps the resolution, each other one halves it. The last pooling takes the maximum over the whole
    image, which is 4 × 4 for images of 32 pixels, as in the original. Logits are scaled by 1/8.

    Args:
        classes: number of logits.
        channels: channels of the images.
        resolution: not used: the model takes images of at least 8 pixels.
    """

    def __init__(self, classes: int, channels: int, resolution: int) -> None:
        super().__init__()
        self.stages = nn.Sequential(
            _convolution(channels, 64),
            nn.Sequential(_convolution(64, 128), nn.MaxPool2d(2), _Residual(128)),
            nn.Sequential(_convolution(128, 256), nn.MaxPool2d(2)),
            nn.Sequential(_convolution(256, 512), nn.MaxPool2d(2), _Residual(512)),
        )
        self.head = nn.Linear(512, classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """(batch, channels, height, width) → (batch, classes)."""
        return self.head(self.stages(images).amax((2, 3))) * _LOGIT_SCALE  # type: ignore[no-any-return]


class _Residual(nn.Sequential):
    def __init__(self, channels: int) -> None:
        super().__init__(_convolution(channels, channels), _convolution(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)  # type: ignore[no-any-return, no-untyped-call]


def _convolution(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )
