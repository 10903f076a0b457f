"""Mixup and CutMix of the images of a global batch, by torchvision."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torchvision.transforms import v2

from pipelines.data.images.augmentation import seeded

_MIXING = 4
"""Separates this stream of random numbers from those of `pipelines.data.images.augmentation`."""


class Mixing:
    """Mixes each image of a global batch with the one before it; the first with the last.

    Which of the two transforms, its weight, and CutMix's rectangle depend only on seed and step. Processes and
    micro-batches do not matter: each takes the row before its first one too, see `rows`.
    """

    def __init__(self, mixup: float, cutmix: float, classes: int, seed: int, batch_size: int) -> None:
        """`mixup` and `cutmix` are the parameters α of Beta distributions; 0 for none. One of them must be positive.

        `batch_size` is that of the global batch.
        """
        kinds = ((v2.MixUp, mixup), (v2.CutMix, cutmix))
        transforms = [kind(alpha=alpha, num_classes=classes) for kind, alpha in kinds if alpha > 0]
        self._mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = v2.RandomChoice(transforms)
        self._seed = seed
        self._batch_size = batch_size

    def rows(self, rows: slice) -> Sequence[int]:
        """Return the rows of the global batch that are needed to mix these."""
        wanted = range(self._batch_size)[rows]
        return wanted if len(wanted) == self._batch_size else [(wanted.start - 1) % self._batch_size, *wanted]

    def __call__(self, images: Tensor, labels: Tensor, step: int, count: int) -> tuple[Tensor, Tensor]:
        """Mix the `count` rows that `rows` was asked for: its answer are `images` (n, channels, h, w), `labels` (n,).

        Returns images (count, channels, h, w), and probabilities (count, classes).
        """
        with seeded(self._seed, step, _MIXING):
            # Trap: torchvision takes the row before as the partner. It does not promise that; a test does.
            mixed, targets = self._mix(images, labels)
        return mixed[-count:], targets[-count:]
