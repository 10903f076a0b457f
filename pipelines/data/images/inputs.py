"""What a network sees of a data set: crops, size, channels, mean and standard deviation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.config import ImageDataSettings, TransformName
from pipelines.data.images.augmentation import Distortion, RandomShift
from pipelines.data.images.image_sets import DecodedImages, ImageData
from pipelines.data.images.transforms import MEAN, STD
from pipelines.errors import AsgoError, UsageError

_RESOLUTIONS = {"paper": 208, "standard": 224}
_MOST_BYTES = 2**30
_CHUNK = 1024  # images counted at once


@dataclass(frozen=True)
class Inputs:
    """The settings of a run's images, with the defaults that depend on the data."""

    transform: TransformName
    resolution: int
    channels: int
    """Of the images: 1 or 3."""
    mean: tuple[float, ...]
    std: tuple[float, ...]


def inputs_of(settings: ImageDataSettings, data: ImageData) -> Inputs:
    """Return what a network sees of this data with these settings.

    Raises `UsageError` if they do not fit the data.
    """
    decoded = data.train if isinstance(data.train, DecodedImages) else None
    transform = settings.transform or ("standard" if decoded is None else "small")
    resolution = settings.resolution or _resolution(transform, data)
    channels = 3 if decoded is None else decoded.pixels.shape[3]
    if transform == "small" and settings.pad >= resolution:
        raise UsageError(f"data.pad={settings.pad} is not below the resolution, {resolution} pixels; lower it")
    if settings.mean is None or settings.std is None:
        mean, std = (MEAN, STD) if decoded is None else _statistics(decoded, data)
        return Inputs(transform, resolution, channels, mean, std)
    if len(settings.mean) != channels:
        raise UsageError(
            f"data.mean and data.std have {len(settings.mean)} values, but the images of {data.folder} have {channels} "
            f"channel{'s' * (channels > 1)}: give {channels}"
        )
    return Inputs(transform, resolution, channels, settings.mean, settings.std)


def _resolution(transform: TransformName, data: ImageData) -> int:
    """Return the default resolution. Raises `UsageError` if there is none."""
    if not isinstance(data.train, DecodedImages):
        if transform in _RESOLUTIONS:
            return _RESOLUTIONS[transform]
        raise UsageError(f"data.transform={transform}: the images of {data.folder} vary in size; set data.resolution")
    return int(min(data.train.pixels.shape[1:3]))  # classifiers take squares: the centre of each image


def _statistics(images: DecodedImages, data: ImageData) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if not len(images):
        raise AsgoError(f"{data.folder}: has no training images")
    mean, std = pixel_statistics(images.pixels)
    if 0.0 in std:
        raise UsageError(
            f"{data.folder}: all pixels of channel {std.index(0.0)} have one value, so their standard deviation is 0; "
            "set data.mean and data.std"
        )
    return mean, std


def random_changes(
    settings: ImageDataSettings, inputs: Inputs, seed: int, images: int
) -> tuple[RandomShift | None, Distortion | None]:
    """Return the random changes of training images besides their crops, for a data set of `images`."""
    shift = RandomShift(settings.pad, settings.flip, seed, images) if inputs.transform == "small" else None
    if not (settings.randaugment or settings.erasing):
        return shift, None
    colour = tuple(round(255 * value) for value in inputs.mean)
    return shift, Distortion(settings.randaugment, settings.randaugment_magnitude, settings.erasing, colour)


def pixel_statistics(pixels: NDArray[np.uint8]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel of (images, height, width, channels), of values from 0 to 1.

    Of data of more than a GiB, it takes every second, third, ... image. The result is exact up to one rounding, and so
    equal on all machines.
    """
    chosen = pixels[:: max(1, -(-pixels.nbytes // _MOST_BYTES))]
    counts = np.zeros((pixels.shape[3], 256), np.int64)
    for start in range(0, len(chosen), _CHUNK):
        chunk = chosen[start : start + _CHUNK]
        for channel, of_channel in enumerate(counts):
            of_channel += np.bincount(chunk[..., channel].ravel(), minlength=256)
    means, stds = [], []
    for histogram in counts.tolist():
        number = sum(histogram)
        total = sum(value * count for value, count in enumerate(histogram))
        squares = sum(value**2 * count for value, count in enumerate(histogram))
        means.append(total / (255 * number))
        stds.append(math.sqrt((number * squares - total**2) / (255 * number) ** 2))
    return tuple(means), tuple(stds)
