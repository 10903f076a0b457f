"""Speed of batches of small decoded images, compared with torchvision's transforms in torch's `DataLoader`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from pipelines.benchmarks.turns import Contestant, Progress, in_turns
from pipelines.data.images.augmentation import RandomShift
from pipelines.data.images.decode import Pixels
from pipelines.data.images.image_sets import DecodedImages
from pipelines.data.images.index import build_index
from pipelines.data.images.loader import DecodedTrainingImages
from pipelines.data.images.workers import default_workers
from pipelines.errors import AsgoError

TORCHVISION, SMALL, NONE = "torchvision", "asgo, small", "asgo, none"
SIZE, PAD = 32, 4
BATCH_SIZE, BATCHES = 256, 60
"""Images per batch; batches per turn."""


@dataclass(frozen=True)
class DecodedLoaderReport:
    """Results in images per second; the first contestant is torchvision, with `workers` processes."""

    workers: int
    contestants: tuple[Contestant, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the report as plain values for JSON."""
        return {
            "workers": self.workers,
            "loading": [
                {"name": each.name, "images_per_s": each.rates, "speedup": each.speedup(self.contestants[0])}
                for each in self.contestants
            ],
        }


def bench_decoded_loader(workers: int | None, repeats: int, progress: Progress) -> DecodedLoaderReport:
    """Measure the speed of uint8 batches of images of 32 x 32 pixels: shifted by up to 4 pixels and mirrored.

    torchvision has `workers` processes (default: one per core); asgo has this process and one thread, and also makes
    batches of unchanged images. Time starts with the first batch, which excludes startup.
    """
    workers = default_workers() if workers is None else workers
    pixels = np.random.default_rng(0).integers(0, 256, (BATCH_SIZE * BATCHES, SIZE, SIZE, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory(prefix="asgo-bench-") as folder:
        images = _write(Path(folder) / "train.images", pixels)
        shift = RandomShift(PAD, True, 0, len(images))
        ways = {
            TORCHVISION: lambda: _rate(_torchvision_batches(pixels, workers)),
            SMALL: lambda: _rate(_our_batches(images, shift)),
            NONE: lambda: _rate(_our_batches(images, None)),
        }
        contestants = tuple(Contestant(*each) for each in in_turns(ways, repeats, progress).items())
    return DecodedLoaderReport(workers, contestants)


def _write(path: Path, pixels: Pixels) -> DecodedImages:
    path.write_bytes(pixels.data)
    names = [str(number) for number in range(len(pixels))]
    index = build_index([0] * len(pixels), names, [pixels[0].size] * len(pixels))
    return DecodedImages(path, index, ["class"], pixels.shape[1:])


class _Pictures(Dataset[Tensor]):
    """Like torchvision's `CIFAR10`: Pillow images of an array in memory, with the usual transforms."""

    def __init__(self, pixels: Pixels) -> None:
        self._pixels = pixels
        self._transform = transforms.Compose(
            [
                transforms.RandomCrop(SIZE, padding=PAD, padding_mode="reflect"),
                transforms.RandomHorizontalFlip(),
                transforms.PILToTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, index: int) -> Tensor:
        picture: Tensor = self._transform(Image.fromarray(self._pixels[index]))
        return picture


def _torchvision_batches(pixels: Pixels, workers: int) -> Iterable[Tensor]:
    return DataLoader(_Pictures(pixels), BATCH_SIZE, shuffle=True, num_workers=workers)


def _our_batches(images: DecodedImages, shift: RandomShift | None) -> Iterator[Tensor]:
    training = DecodedTrainingImages(images, shift, 0, BATCH_SIZE)
    for step in range(BATCHES):
        yield training.batch(step)[0]


def _rate(batches: Iterable[Tensor]) -> float:
    """Return the images per second after the first batch."""
    moments = []
    for batch in batches:
        if batch.shape != (BATCH_SIZE, 3, SIZE, SIZE) or batch.dtype != torch.uint8:
            raise AsgoError(f"unexpected batch of shape {tuple(batch.shape)} and type {batch.dtype}")
        moments.append(time.perf_counter())
    return BATCH_SIZE * (len(moments) - 1) / (moments[-1] - moments[0])
