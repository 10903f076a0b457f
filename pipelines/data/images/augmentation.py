"""Random changes of training images that only depend on seed, epoch and image: shifts, RandAugment and erasing."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.data.images.decode import Pixels
from pipelines.data.images.transforms import Key
from pipelines.data.permutation import frozen_generator

Integers = NDArray[np.int64]

# The last number of a key separates streams of random numbers: 1 belongs to `RandomCrop`.
_SHIFTS, _DISTORTIONS = 2, 3


@dataclass(frozen=True)
class RandomShift:
    """Extend an image by a reflected border of `pad` pixels, crop its size, and mirror it with probability 1/2.

    torchvision's `RandomCrop(size, padding=pad, padding_mode="reflect")` and `RandomHorizontalFlip()`, for a batch at
    once. `pad` must be less than the size, and 0 for no crops; `flip` is false for no flips.
    """

    pad: int
    flip: bool
    seed: int
    count: int
    """Number of images in an epoch."""

    def take(self, pixels: Pixels, at: Integers, epochs: Integers, images: Integers, into: Pixels) -> None:
        """Write the shifted `pixels[at]` into `into`, (n, height, width, channels).

        `pixels` is (any, height, width, channels). `at`, `epochs` and `images`, all (n,), are the places in it, and
        what the shifts depend on: the epoch, and the index of the image in the data set.
        """
        _, height, width, channels = pixels.shape
        tops, lefts, mirrored = self._drawn(epochs, images)
        rows = _reflected(tops[:, None] + np.arange(height) - self.pad, height)
        columns = np.where(mirrored[:, None], np.arange(width)[::-1], np.arange(width))
        columns = _reflected(lefts[:, None] + columns - self.pad, width)
        places = ((at[:, None] * height + rows) * width)[:, :, None] + columns[:, None, :]
        np.take(pixels.reshape(-1, channels), places, axis=0, out=into, mode="clip")  # "raise" would copy `into`

    def _drawn(self, epochs: Integers, images: Integers) -> tuple[Integers, Integers, NDArray[np.bool_]]:
        drawn = np.empty((3, len(images)), np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            drawn[:, here] = _shifts(self.seed, int(epoch), self.count, self.pad)[:, images[here]]
        return drawn[0], drawn[1], (drawn[2] == 1) & self.flip


@functools.lru_cache(maxsize=2)  # micro-batches alternate between two epochs at an epoch's end
def _shifts(seed: int, epoch: int, count: int, pad: int) -> NDArray[np.int16]:
    """Return the top and left edge of each image's crop in the extended image, and whether it is mirrored."""
    draw = frozen_generator(seed, epoch, _SHIFTS)
    return np.stack([draw.randint(high, size=count).astype(np.int16) for high in (2 * pad + 1, 2 * pad + 1, 2)])


def _reflected(places: Integers, size: int) -> Integers:
    """Map places from -size + 1 to 2 size - 2 to those of an image that is mirrored at its first and last pixel."""
    reflected: Integers = size - 1 - np.abs(size - 1 - np.abs(places))
    return reflected


@dataclass(frozen=True)
class Distortion:
    """torchvision's `RandAugment` with so many `operations`, and then `RandomErasing` with this probability."""

    operations: int
    magnitude: int
    erasing: float
    colour: tuple[int, ...]
    """What erased pixels become, from 0 to 255: a value for each channel."""

    def __call__(self, pixels: Pixels, key: Key) -> Pixels:
        """Return other pixels of the same shape (height, width, channels), which depend on these and on `key` only."""
        image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
        with seeded(*key, _DISTORTIONS):
            changed: Pixels = _transform_of(self)(image).permute(1, 2, 0).numpy()
        return changed


@functools.lru_cache(maxsize=2)  # not an attribute: its tensors would be sent to other processes through files
def _transform_of(distortion: Distortion) -> Callable[[Tensor], Tensor]:
    from torchvision.transforms import v2  # takes a second to import

    steps = [v2.RandAugment(distortion.operations, distortion.magnitude)] if distortion.operations else []
    steps += [v2.RandomErasing(distortion.erasing, value=distortion.colour)] if distortion.erasing else []
    transform: Callable[[Tensor], Tensor] = v2.Compose(steps)
    return transform


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Context manager in which the numbers of torch's CPU generator depend on `key` only. Keeps the generator's state.

    Trap: `torch.manual_seed` would reseed the generators of GPUs too, from which dropout draws.
    """
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(
        int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
    )
    try:
        yield
    finally:
        torch.set_rng_state(state)
