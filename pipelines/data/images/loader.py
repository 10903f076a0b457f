"""Batches of images whose content is a pure function of the step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.data.images.workers import ImageWorkers, PendingBatch
from pipelines.data.permutation import EpochStream

ImageBatch = tuple[Tensor, Tensor]
"""Images, uint8 (n, 3, size, size) in channels-last memory format, and their labels, int64 (n,)."""


class TrainingImages:
    """The training images, in an order that depends only on the seed, the batch size and the data.

    Each epoch contains all images once, in its own order. Global batch `step` (0-based) holds the images
    `step * batch_size` up to `(step + 1) * batch_size` of that stream, also across the end of an epoch. Ranks and
    micro-batches take slices of the same global batch, so their number does not change the training data.

    `skipped` holds the images that could not be decoded so far: the reasons by name.
    """

    def __init__(
        self, workers: ImageWorkers, source: str, batch_size: int, parts: Sequence[slice] = (slice(None),)
    ) -> None:
        """Prefetch `parts`, the slices that this process requests in every step, in that order.

        Other slices give the same data, without prefetching.
        """
        images, seed = workers.sources[source].images, workers.sources[source].seed
        self._workers = workers
        self._source = source
        self._labels = images.labels
        self._batch_size = batch_size
        self._parts = [range(batch_size)[part] for part in parts]
        self._stream = EpochStream(len(images), seed)
        self._coming: dict[tuple[int, range], PendingBatch] = {}
        self.images_per_epoch = len(images)
        self.skipped: dict[str, str] = {}

    def batch(self, step: int, rows: slice = slice(None)) -> ImageBatch:
        """Return the given rows of global batch `step`.

        Raises `AsgoError` for an image that cannot be decoded, unless the source's `on_bad` permits it, and if a worker
        process was killed.
        """
        wanted = (step, range(self._batch_size)[rows])
        part = self._coming.pop(wanted, None) or self._start(wanted)
        self._prefetch(wanted)
        return _finish(part, self._labels, self.skipped)

    def epoch_at(self, step: int) -> float:
        """Return the epochs completed before global batch `step`, with a fraction."""
        return step * self._batch_size / self.images_per_epoch

    def _start(self, wanted: tuple[int, range]) -> PendingBatch:
        step, rows = wanted
        epochs, images = self._stream.at(step * self._batch_size + np.array(rows, dtype=np.int64))
        return self._workers.start(self._source, list(zip(epochs.tolist(), images.tolist(), strict=True)))

    def _prefetch(self, now: tuple[int, range]) -> None:
        """Start the parts that come next, and cancel all others."""
        next_ones = self._after(*now)
        coming = [next(next_ones) for _ in range(self._workers.parts_ahead(len(now[1])))]
        for key in self._coming.keys() - set(coming):
            self._coming.pop(key).cancel()
        for key in coming:
            if key not in self._coming:
                self._coming[key] = self._start(key)

    def _after(self, step: int, rows: range) -> Iterator[tuple[int, range]]:
        place = self._parts.index(rows) + 1 if rows in self._parts else len(self._parts)
        while True:
            yield from ((step, part) for part in self._parts[place:])
            step, place = step + 1, 0


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


def _finish(part: PendingBatch, labels: NDArray[np.int64], skipped: dict[str, str]) -> ImageBatch:
    """Wait for a part and remove the rows of skipped images."""
    decoded = part.wait()
    skipped |= decoded.bad
    used = torch.tensor(decoded.used, dtype=torch.int64)
    pixels = part.pixels
    if (used < 0).any():
        pixels, used = pixels[used >= 0], used[used >= 0]
    return pixels.permute(0, 3, 1, 2), torch.from_numpy(labels[used.numpy()])
