"""Crop, resize and normalize images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipelines.config import TransformName
from pipelines.data.images.decode import EncodedImage, Pixels, RawImage, picture_of
from pipelines.data.permutation import frozen_generator

Key = tuple[int, ...]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of red, green and blue over ImageNet, for values between 0 and 1."""

# A reduced decoded image must be at least this many times the resized size, in each direction.
_MARGIN = 2.0
_ROUNDING = 1e-6
# On other CPUs, torch resizes uint8 without vector instructions and takes twenty times as long as Pillow.
_TORCH_IS_FAST = torch.backends.cpu.get_cpu_capability().startswith("AVX")


@dataclass(frozen=True)
class View:
    """A crop: the part `box` of the image is resized to `resized`; the square at `corner` of that is the result."""

    box: tuple[int, int, int, int]
    """Left, top, right and bottom edge, in pixels of the image at full size."""
    resized: tuple[int, int]
    """Height and width."""
    corner: tuple[int, int]
    """Top and left edge of the square, in the resized image."""
    size: int
    """Height and width of the square."""
    mirrored: bool = False


class Transform(Protocol):
    """Chooses the crop of an image; the same for the same key, on every machine."""

    @property
    def size(self) -> int:
        """Height and width of the result."""

    def view(self, height: int, width: int, key: Key) -> View:
        """Return the crop of an image of this size; `key` is the seed, the epoch and the image's index."""


@dataclass(frozen=True)
class CentreCrop:
    """torchvision's `Resize(resize)`, which resizes the shorter side, and `CenterCrop(size)`."""

    resize: int
    size: int

    def view(self, height: int, width: int, key: Key) -> View:
        """Return the same crop for every key."""
        shorter = min(height, width)
        resized = (int(self.resize * height / shorter), int(self.resize * width / shorter))
        corner = (round((resized[0] - self.size) / 2), round((resized[1] - self.size) / 2))
        return View((0, 0, width, height), resized, corner, self.size)


@dataclass(frozen=True)
class RandomCrop:
    """torchvision's `RandomResizedCrop(size)`, then, with `flip`, a horizontal flip with probability 1/2."""

    size: int
    flip: bool = True

    def view(self, height: int, width: int, key: Key) -> View:
        """Return a random crop that depends only on `key` and the size."""
        draw = frozen_generator(*key, 1)  # the 1 separates this stream from that of the epoch's order
        box = _random_box(height, width, draw)
        mirrored = self.flip and draw.random_sample() < 0.5
        return View(box, (self.size, self.size), (0, 0), self.size, mirrored)


def build_transforms(name: TransformName, size: int, flip: bool = True) -> tuple[Transform, CentreCrop]:
    """Return the transforms for training and for validation.

    "standard" uses `RandomCrop` for training; for validation it resizes the shorter side to 8/7 of `size` and crops the
    centre. All others resize the shorter side to `size` and crop the centre, for both; in training, "small" then uses
    `RandomShift`.
    """
    if name == "standard":
        return RandomCrop(size, flip), CentreCrop(size * 256 // 224, size)
    return CentreCrop(size, size), CentreCrop(size, size)


def render(image: EncodedImage | RawImage, view: View, *, exact: bool = False) -> Pixels:
    """Return the pixels of a view, (size, size, 3 or 1).

    With `exact`, they equal those of torchvision's transforms on Pillow images bit for bit. Otherwise it takes about
    half the time. First, torch resizes with weights of fewer bits: about one value in a thousand differs, by 1 of 255.
    Second, an image with at least four times the needed pixels in each direction is decoded at 1/2, 1/4 or 1/8 of its
    size, but at no less than twice the needed pixels: the values of an image then differ by less than 1.5 of 255 on
    average (typically 0.3) and by at most 16.

    Raises `BadImageError` for a damaged image.
    """
    top, left = view.corner
    rows, columns = slice(top, top + view.size), slice(left, left + view.size)
    if exact:
        part = image.picture().crop(view.box).resize(view.resized[::-1], Image.Resampling.BILINEAR)
        seen = np.asarray(part).reshape(*view.resized, -1)[rows, columns]
    else:
        shrink = image.largest_shrink(_surplus(view) / _MARGIN)
        seen = _resize(image.pixels(shrink), [edge / shrink for edge in view.box], view.resized)[rows, columns]
    return seen[:, ::-1] if view.mirrored else seen


class Normalize:
    """Convert uint8 images to float32 of mean 0 and standard deviation 1, on their device.

    The constants are copied to the device once: a copy in each step would wait for the GPU.
    """

    def __init__(
        self,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        device: torch.device | None = None,
        *,
        channels: int | None = None,
        channels_last: bool = False,
    ) -> None:
        """`mean` and `std` are of values between 0 and 1, one for each channel of the images.

        `channels` is 3 to repeat the only channel of gray images, for a network that takes colour.
        """
        repeats = (channels or len(mean)) // len(mean)
        self._channels = repeats * len(mean)
        self._channels_last = channels_last
        constants = (tuple(each) * repeats for each in (mean, std))
        self._mean, self._std = (torch.tensor(each, dtype=torch.float32, device=device) for each in constants)

    def __call__(self, images: Tensor) -> Tensor:
        """Return (n, channels, h, w), also if the images are (n, 1, h, w)."""
        images = images.expand(-1, self._channels, -1, -1)
        if self._channels_last:
            # Long rows, (n, h, w * channels), are fast on a CPU.
            rows = images.permute(0, 2, 3, 1).flatten(2).to(torch.float32)
            mean, std = (each.repeat(images.shape[3]) for each in (self._mean, self._std))
            rows = rows.div_(255).sub_(mean).div_(std)
            return rows.view(*rows.shape[:2], -1, self._channels).permute(0, 3, 1, 2)
        mean, std = (each[:, None, None] for each in (self._mean, self._std))
        return images.contiguous().to(torch.float32).div_(255).sub_(mean).div_(std)


def _surplus(view: View) -> float:
    """Return the factor by which the view reduces its part, the smaller one of the two directions."""
    left, top, right, bottom = view.box
    return min((bottom - top) / view.resized[0], (right - left) / view.resized[1])


def _resize(pixels: Pixels, box: list[float], size: tuple[int, int]) -> Pixels:
    """Resize a part of the pixels to `size` (height, width), with antialiased bilinear interpolation."""
    x, y = math.floor(box[0]), math.floor(box[1])
    part = pixels[y : math.ceil(box[3]), x : math.ceil(box[2])]
    if not _TORCH_IS_FAST or not (box[0].is_integer() and box[1].is_integer()):
        # Only Pillow supports a box that starts inside a pixel. Rounding its edges would shift the whole image.
        inner = (box[0] - x, box[1] - y, box[2] - x, box[3] - y)
        resized = picture_of(part).resize(size[::-1], Image.Resampling.BILINEAR, box=inner)
        return np.asarray(resized).reshape(*size, -1)
    planes = torch.from_numpy(part).permute(2, 0, 1)[None]
    # Pass scales, not the size: the part may end inside a pixel. torch rounds the size down, hence `_ROUNDING`.
    scales = ((size[0] + _ROUNDING) / (box[3] - y), (size[1] + _ROUNDING) / (box[2] - x))
    enlarged = torch.nn.functional.interpolate(planes, scale_factor=scales, mode="bilinear", antialias=True)
    seen: Pixels = enlarged[0].permute(1, 2, 0).numpy()
    return seen


def _random_box(height: int, width: int, draw: np.random.RandomState) -> tuple[int, int, int, int]:
    """Return a random part with 8 % to 100 % of the area and an aspect ratio of 3:4 to 4:3, as torchvision does."""
    ratios = (3 / 4, 4 / 3)
    for _ in range(10):
        area = height * width * draw.uniform(0.08, 1.0)
        ratio = math.exp(draw.uniform(math.log(ratios[0]), math.log(ratios[1])))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            top, left = draw.randint(height - down + 1), draw.randint(width - across + 1)
            return left, top, left + across, top + down
    # For very long or tall images: the largest centered part with an allowed aspect ratio.
    across = min(width, round(height * ratios[1]))
    down = min(height, round(width / ratios[0]))
    top, left = (height - down) // 2, (width - across) // 2
    return left, top, left + across, top + down
