"""What is cut out of an image, how it is resized, and how pixels become the numbers that a network sees."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipelines.data.images.decode import EncodedImage, Pixels

TransformName = Literal["paper", "standard"]
Key = tuple[int, ...]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of red, green and blue over ImageNet, for values between 0 and 1."""

# Decoded images are to have at least so many times the pixels, each way, of what they are resized to.
_MARGIN = 2.0
_ROUNDING = 1e-6
_PAPER_SIZE, _STANDARD_SIZE = 208, 224
# Of other processors torch makes no use to resize bytes, and takes twenty times as long as Pillow.
_TORCH_IS_FAST = torch.backends.cpu.get_cpu_capability().startswith("AVX")


@dataclass(frozen=True)
class View:
    """How an image is seen: its part `box` is resized to `resized`, of which the square at `corner` is left."""

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
    """Decides how images are seen; the same for the same key, on any machine."""

    @property
    def size(self) -> int:
        """Height and width of what is seen."""

    def view(self, height: int, width: int, key: Key) -> View:
        """How an image of this size is seen; `key` is the seed, the epoch and the image's index."""


@dataclass(frozen=True)
class CentreCrop:
    """torchvision's `Resize(resize)`, of the shorter side, and `CenterCrop(size)`."""

    resize: int
    size: int

    def view(self, height: int, width: int, key: Key) -> View:
        """The same for every key."""
        shorter = min(height, width)
        resized = (int(self.resize * height / shorter), int(self.resize * width / shorter))
        corner = (round((resized[0] - self.size) / 2), round((resized[1] - self.size) / 2))
        return View((0, 0, width, height), resized, corner, self.size)


@dataclass(frozen=True)
class RandomCrop:
    """torchvision's `RandomResizedCrop(size)`, then mirrored with probability 1/2."""

    size: int

    def view(self, height: int, width: int, key: Key) -> View:
        """Drawn by `key` alone."""
        # The frozen generator, as in `frozen_permutation`; the 1 tells this stream from that of an epoch's order.
        draw = np.random.RandomState(np.random.MT19937(np.random.SeedSequence((*key, 1))))
        box = _random_box(height, width, draw)
        return View(box, (self.size, self.size), (0, 0), self.size, mirrored=draw.random_sample() < 0.5)


def build_transforms(name: TransformName, size: int | None = None) -> tuple[Transform, Transform]:
    """The transforms for training and for validation.

    "paper" resizes the shorter side to `size` (208) and takes the centre, for both. "standard" trains on random parts
    of any shape, mirrored or not, and validates on the centre, of `size` (224) after resizing to 8/7 of that.
    """
    if name == "paper":
        size = size or _PAPER_SIZE
        return CentreCrop(size, size), CentreCrop(size, size)
    size = size or _STANDARD_SIZE
    return RandomCrop(size), CentreCrop(size * 256 // 224, size)


def render(image: EncodedImage, view: View, *, exact: bool = False) -> Pixels:
    """The pixels that are seen, (size, size, 3).

    With `exact` they are bit for bit those of torchvision's transforms on Pillow's images. Without, it is done in about
    half the time: torch resizes with weights of fewer bits, so that about one value in a thousand differs, by 1 of
    255. And an image that has four times the pixels that are wanted, each way, is decoded at a half, a quarter or an
    eighth of its size, so long as twice the pixels are left: the values of an image then differ by less than 1.5 of 255
    in the mean (0.3 is usual) and by 16 at most.

    Raises `BadImageError` for a damaged image.
    """
    top, left = view.corner
    rows, columns = slice(top, top + view.size), slice(left, left + view.size)
    if exact:
        part = image.picture().crop(view.box).resize(view.resized[::-1], Image.Resampling.BILINEAR)
        seen = np.asarray(part)[rows, columns]
    else:
        shrink = image.largest_shrink(_surplus(view) / _MARGIN)
        seen = _resize(image.pixels(shrink), [edge / shrink for edge in view.box], view.resized)[rows, columns]
    return seen[:, ::-1] if view.mirrored else seen


def normalize(images: Tensor, *, channels_last: bool = False) -> Tensor:
    """uint8 (n, 3, h, w) to float32 of mean 0 and deviation 1 over ImageNet, on the device where the images are."""
    if channels_last:
        rows = images.permute(0, 2, 3, 1).flatten(2).to(torch.float32)  # (n, h, w * 3): long rows are fast on a CPU
        mean, std = (torch.tensor(each, device=images.device).repeat(images.shape[3]) for each in (MEAN, STD))
        return rows.div_(255).sub_(mean).div_(std).view(*rows.shape[:2], -1, 3).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(each, device=images.device)[:, None, None] for each in (MEAN, STD))
    return images.contiguous().to(torch.float32).div_(255).sub_(mean).div_(std)


def _surplus(view: View) -> float:
    """How many times as large as resized the part is, in the direction where it is less so."""
    left, top, right, bottom = view.box
    return min((bottom - top) / view.resized[0], (right - left) / view.resized[1])


def _resize(pixels: Pixels, box: list[float], size: tuple[int, int]) -> Pixels:
    """Resize a part of the pixels to `size` (height, width), by linear weights over all that each new pixel covers."""
    x, y = math.floor(box[0]), math.floor(box[1])
    part = pixels[y : math.ceil(box[3]), x : math.ceil(box[2])]
    if not _TORCH_IS_FAST or not (box[0].is_integer() and box[1].is_integer()):
        # Only Pillow begins within a pixel. To round edges would shift the image, and change it much more.
        inner = (box[0] - x, box[1] - y, box[2] - x, box[3] - y)
        image = Image.fromarray(np.ascontiguousarray(part))
        return np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR, box=inner))
    planes = torch.from_numpy(part).permute(2, 0, 1)[None]
    # By scales and not by size, because the part may end within a pixel; torch rounds the size down.
    scales = ((size[0] + _ROUNDING) / (box[3] - y), (size[1] + _ROUNDING) / (box[2] - x))
    resized = torch.nn.functional.interpolate(planes, scale_factor=scales, mode="bilinear", antialias=True)
    seen: Pixels = resized[0].permute(1, 2, 0).numpy()
    return seen


def _random_box(height: int, width: int, draw: np.random.RandomState) -> tuple[int, int, int, int]:
    """A part with 8 % to 100 % of the area, and sides as 3:4 to 4:3, drawn as torchvision does."""
    ratios = (3 / 4, 4 / 3)
    for _ in range(10):
        area = height * width * draw.uniform(0.08, 1.0)
        ratio = math.exp(draw.uniform(math.log(ratios[0]), math.log(ratios[1])))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            top, left = draw.randint(height - down + 1), draw.randint(width - across + 1)
            return left, top, left + across, top + down
    # Long and narrow: the largest part in the middle that has an allowed shape.
    across = min(width, round(height * ratios[1]))
    down = min(height, round(width / ratios[0]))
    top, left = (height - down) // 2, (width - across) // 2
    return left, top, left + across, top + down
