"""Batches of images whose content is a pure function of the step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.data.images.augmentation import RandomShift
from pipelines.data.images.image_sets import DecodedImages, ImageSet
from pipelines.data.images.transforms import CentreCrop
from pipelines.data.images.workers import ImageSource, ImageWorkers, PendingBatch
from pipelines.data.permutation import EpochStream

ImageBatch = tuple[Tensor, Tensor]
"""Images, uint8 (n, 3 or 1, size, size) in channels-last memory format, and their labels, int64 (n,)."""
Rows = range | tuple[int, ...]
_CHUNK = 128  # images shifted at once: the places of their pixels fit into a CPU's cache


class _TrainingStream:
    """An endless stream of the training images, cut into global batches."""

    def __init__(self, images: ImageSet, seed: int, batch_size: int) -> None:
        self._labels = images.labels
        self._batch_size = batch_size
        self._stream = EpochStream(len(images), seed)
        self.images_per_epoch = len(images)
        self.skipped: dict[str, str] = {}

    def epoch_at(self, step: int) -> float:
        """Return the epochs completed before global batch `step`, with a fraction."""
        return step * self._batch_size / self.images_per_epoch

    def _at(self, step: int, rows: Rows) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the epochs and the indices of the images in these rows of global batch `step`."""
        return self._stream.at(step * self._batch_size + np.array(rows, dtype=np.int64))

    def _rows(self, rows: slice | Sequence[int]) -> Rows:
        return range(self._batch_size)[rows] if isinstance(rows, slice) else tuple(rows)


class TrainingImages(_TrainingStream):
    """The training images, in an order that depends only on the seed, the batch size and the data.

    Each epoch contains all images once, in its own order. Global batch `step` (0-based) holds the images
    `step * batch_size` up to `(step + 1) * batch_size` of that stream, also across the end of an epoch. Ranks and
    micro-batches take slices of the same global batch, so their number does not change the training data.

    `skipped` holds the images that could not be decoded so far: the reasons by name.
    """

    def __init__(
        self,
        workers: ImageWorkers,
        source: str,
        batch_size: int,
        parts: Sequence[slice | Sequence[int]] = (slice(None),),
    ) -> None:
        """Prefetch `parts`, the rows that this process requests in every step, in that order.

        Other rows give the same data, without prefetching.
        """
        super().__init__(workers.sources[source].images, workers.sources[source].seed, batch_size)
        self._workers = workers
        self._source = source
        self._parts = [self._rows(part) for part in parts]
        self._coming: dict[tuple[int, Rows], PendingBatch] = {}

    def batch(self, step: int, rows: slice | Sequence[int] = slice(None)) -> ImageBatch:
        """Return the given rows of global batch `step`.

        Raises `AsgoError` for an image that cannot be decoded, unless the source's `on_bad` permits it, and if a worker
        process was killed.
        """
        wanted = (step, self._rows(rows))
        part = self._coming.pop(wanted, None) or self._start(wanted)
        self._prefetch(wanted)
        return _finish(part, self._labels, self.skipped)

    def _start(self, wanted: tuple[int, Rows]) -> PendingBatch:
        epochs, images = self._at(*wanted)
        return self._workers.start(self._source, list(zip(epochs.tolist(), images.tolist(), strict=True)))

    def _prefetch(self, now: tuple[int, Rows]) -> None:
        """Start the parts that come next, and cancel all others."""
        next_ones = self._after(*now)
        coming = [next(next_ones) for _ in range(self._workers.parts_ahead(len(now[1])))]
        for key in self._coming.keys() - set(coming):
            self._coming.pop(key).cancel()
        for key in coming:
            if key not in self._coming:
                self._coming[key] = self._start(key)

    def _after(self, step: int, rows: Rows) -> Iterator[tuple[int, Rows]]:
        place = self._parts.index(rows) + 1 if rows in self._parts else len(self._parts)
        while True:
            yield from ((step, part) for part in self._parts[place:])
            step, place = step + 1, 0


class DecodedTrainingImages(_TrainingStream):
    """The same batches as `TrainingImages`, of decoded images that already have the network's size.

    Made by this process when they are requested: there is nothing to decode.
    """

    def __init__(
        self, images: DecodedImages, shift: RandomShift | None, seed: int, batch_size: int, *, pinned: bool = False
    ) -> None:
        super().__init__(images, seed, batch_size)
        self._pixels = images.pixels
        self._shift = shift
        self._pinned = pinned

    def batch(self, step: int, rows: slice | Sequence[int] = slice(None)) -> ImageBatch:
        """Return the given rows of global batch `step`."""
        epochs, images = self._at(step, self._rows(rows))
        shape = (len(images), *self._pixels.shape[1:])
        batch = torch.empty(shape, dtype=torch.uint8, pin_memory=self._pinned)
        into = batch.numpy()
        for chunk in (slice(start, start + _CHUNK) for start in range(0, len(images), _CHUNK)):
            if self._shift is None:
                np.take(self._pixels, images[chunk], axis=0, out=into[chunk], mode="clip")
            else:
                self._shift.take(self._pixels, images[chunk], epochs[chunk], images[chunk], into[chunk])
        return batch.permute(0, 3, 1, 2), torch.from_numpy(self._labels[images])


class ValidationImages:
    """This process's part of the validation images, in order; can be iterated repeatedly.

    `skipped` holds the images that are left out because they could not be decoded: the reasons by name.
    """

    def __init__(self, workers: ImageWorkers, source: str, batches: Sequence[range]) -> None:
        """`batches` are the indices of each batch's images."""
        self._workers = workers
        self._source = source
        self._labels = workers.sources[source].images.labels
        self._batches = batches
        self.skipped: dict[str, str] = {}

    def __len__(self) -> int:
        """Return the number of batches, including empty ones."""
        return len(self._batches)

    def __iter__(self) -> Iterator[ImageBatch]:
        """Yield each batch, without skipped images. Raises as `TrainingImages.batch` does."""
        to_come = iter(self._batches)
        coming: list[PendingBatch] = []
        try:
            for batch in self._batches:
                while (
                    len(coming) <= self._workers.parts_ahead(max(1, len(batch)))
                    and (rows := next(to_come, None)) is not None
                ):
                    coming.append(self._workers.start(self._source, [(0, index) for index in rows]))
                yield _finish(coming.pop(0), self._labels, self.skipped)
        finally:
            for part in coming:
                part.cancel()


class DecodedValidationImages:
    """The same batches as `ValidationImages`, of decoded images that already have the network's size."""

    def __init__(self, images: DecodedImages, batches: Sequence[range]) -> None:
        self._images = images
        self._batches = batches
        self.skipped: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[ImageBatch]:
        for rows in self._batches:
            chosen = slice(rows.start, rows.stop)
            pixels, labels = self._images.pixels[chosen], self._images.labels[chosen]
            yield torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2), torch.from_numpy(labels)


def open_loaders(
    train: ImageSource,
    validation: ImageSource,
    batch_size: int,
    parts: Sequence[slice | Sequence[int]],
    validation_batches: Sequence[range],
    workers: int | None = None,
    *,
    pinned: bool = False,
) -> tuple[TrainingImages | DecodedTrainingImages, ValidationImages | DecodedValidationImages, ImageWorkers]:
    """Return training and validation batches, and the processes that decode them: none if nothing is to decode.

    `workers` is their number; see `TrainingImages` and `ValidationImages` for the rest.
    """
    sources = {"train": train, "validation": validation}
    ready = {name: images for name, source in sources.items() if (images := _ready_images(source)) is not None}
    to_decode = {name: source for name, source in sources.items() if name not in ready}
    started = ImageWorkers(to_decode, workers if to_decode else 0, pinned=pinned)
    return (
        DecodedTrainingImages(ready["train"], train.shift, train.seed, batch_size, pinned=pinned)
        if "train" in ready
        else TrainingImages(started, "train", batch_size, parts),
        DecodedValidationImages(ready["validation"], validation_batches)
        if "validation" in ready
        else ValidationImages(started, "validation", validation_batches),
        started,
    )


def _ready_images(source: ImageSource) -> DecodedImages | None:
    """Return the images if they are decoded, have the network's size, and are not distorted."""
    whole = (source.transform.size,) * 2
    if not isinstance(source.images, DecodedImages) or source.images.pixels.shape[1:3] != whole:
        return None
    return source.images if source.transform == CentreCrop(*whole) and source.distortion is None else None


def _finish(part: PendingBatch, labels: NDArray[np.int64], skipped: dict[str, str]) -> ImageBatch:
    """Wait for a part and remove the rows of skipped images."""
    decoded = part.wait()
    skipped |= decoded.bad
    used = torch.tensor(decoded.used, dtype=torch.int64)
    pixels = part.pixels
    if (used < 0).any():
        pixels, used = pixels[used >= 0], used[used >= 0]
    return pixels.permute(0, 3, 1, 2), torch.from_numpy(labels[used.numpy()])
