"""Image classification as a task of the training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.vision import build_classifier, why_refused
from pipelines.config import ImageNetRunConfig
from pipelines.data.images.image_sets import open_images
from pipelines.data.images.loader import TrainingImages, ValidationImages
from pipelines.data.images.transforms import build_transforms, normalize
from pipelines.data.images.workers import ImageSource, ImageWorkers
from pipelines.errors import AsgoError, UsageError
from pipelines.training.device import autocast, pick_precision
from pipelines.training.distributed import ALONE, Ranks, local_batch, rounds
from pipelines.training.parallel import place_model
from pipelines.training.task import Batch

_TOP = 5
_USUAL_RESOLUTIONS = (224, 256, 299, 384, 512)
_UNKNOWN = -100
"""Label of a dummy image, which the metrics ignore."""


class ImageNetTask:
    """Images, a torchvision classifier, and the mean cross-entropy of the classes in nats."""

    tokens_per_sample = 1

    def __init__(self, config: ImageNetRunConfig, device: torch.device, ranks: Ranks = ALONE) -> None:
        """Raises `AsgoError` if the data folder cannot be read.

        Raises `UsageError` if the classifier does not exist or does not accept the images, or if the batch does not
        divide equally among the ranks.
        """
        training = config.training
        self._rows = local_batch(training, ranks)
        self.data = open_images(Path(config.data.folder))
        try:
            _require_possible(config, len(self.data.classes), self._rows.micro_batch_size * ranks.size)
            model = build_classifier(config.model.name, len(self.data.classes))
        except ValueError as error:
            raise UsageError(f"model.name: {error}") from None
        self._channels_last = config.model.channels_last
        layout = torch.channels_last if self._channels_last else torch.contiguous_format
        model = model.to(memory_format=layout)
        self.model = place_model(model, device, ranks, config.runtime)
        self.network: nn.Module = self.model
        self._ranks = ranks
        self._device = device
        self._dtype = pick_precision(training, device)
        self._label_smoothing = training.label_smoothing
        self._open_images(config, device)
        self._right = torch.zeros(2, device=device)
        self._seen = 0

    def _open_images(self, config: ImageNetRunConfig, device: torch.device) -> None:
        train, validation = build_transforms(config.data.transform, config.data.resolution)
        exact, skips = not config.data.reduced_decoding, config.data.bad_images == "skip"
        sources = {
            "train": ImageSource(self.data.train, train, config.seed, "replace" if skips else "stop", exact),
            "validation": ImageSource(self.data.validation, validation, 0, "leave out" if skips else "stop", exact),
        }
        self._workers = ImageWorkers(sources, config.runtime.workers, pinned=device.type == "cuda")
        self._train = TrainingImages(self._workers, "train", config.training.batch_size, self._rows.micro_batches)
        images = len(self.data.validation)
        count = min(images, config.validation_samples or images)
        batches = list(rounds(count, self._rows.micro_batch_size, self._ranks))
        self._validation = ValidationImages(self._workers, "validation", batches)

    def load_initial_weights(self) -> list[str]:
        """Do nothing: a classifier begins with random weights."""
        return []

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """Yield (images, labels): uint8 (micro_batch_size, 3, resolution, resolution), int64 (micro_batch_size,)."""
        self._right.zero_()
        self._seen = 0
        for rows in self._rows.micro_batches:
            yield self._train.batch(step, rows)

    def loss(self, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of a micro-batch, shape ()."""
        logits, labels = self._classify(batch)
        self._right += _right_among_top(logits.detach(), labels)
        self._seen += len(labels)
        return functional.cross_entropy(logits, labels, label_smoothing=self._label_smoothing)

    def training_metrics(self) -> dict[str, float]:
        """Return top-1 and top-5 accuracy of the last step, over all ranks. Synchronizes with the device."""
        return _accuracies(self._ranks.sum(self._right.clone()).tolist(), self._seen * self._ranks.size)

    @torch.no_grad()
    def evaluate(self, should_stop: Callable[[], bool]) -> dict[str, float] | None:
        """Return the mean loss, without label smoothing, and the accuracies over the validation images."""
        dtype = torch.float32 if self._device.type == "mps" else torch.float64  # MPS has no float64
        sums = torch.zeros(4, dtype=dtype, device=self._device)
        self.model.eval()
        for batch in self._validation:
            if should_stop():
                self.model.train()
                return None
            logits, labels = self._classify(_or_one_unknown(batch))
            loss = functional.cross_entropy(logits, labels, reduction="sum", ignore_index=_UNKNOWN)
            sums += torch.stack([loss, *_right_among_top(logits, labels), (labels != _UNKNOWN).sum()])
        self.model.train()
        loss, *right, seen = self._ranks.sum(sums).tolist()
        if not seen:
            reason = next(iter(self._validation.skipped.values()), "there are none")
            raise AsgoError(f"{self.data.folder}: no validation image can be decoded, so there is no loss: {reason}")
        return {"loss": loss / seen, **_accuracies(right, seen)}

    def epoch_at(self, step: int) -> float:
        """Return the passes over the training images after `step` steps."""
        return self._train.epoch_at(step)

    def description(self) -> dict[str, Any]:
        """Return the data's fingerprint, and ids and names of its classes."""
        classes = [[each.id, each.name] for each in self.data.classes]
        return {"fingerprint": self.data.fingerprint, "classes": classes}

    def notes(self) -> list[str]:
        """Return a line about training and validation images that could not be decoded, with an example."""
        lines = []
        for part, skipped in (("training", self._train.skipped), ("validation", self._validation.skipped)):
            if skipped:
                first = next(iter(skipped.values()))
                lines.append(f"{part} images skipped: {len(skipped):,}; the first: {first}")
        return lines

    def close(self) -> None:
        """End the worker processes."""
        self._workers.close()

    def _classify(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return float32 logits (n, classes) and labels (n,), on the model's device."""
        images, labels = (part.to(self._device, non_blocking=True) for part in batch)
        with autocast(self._device, self._dtype):
            logits = self.network(normalize(images, channels_last=self._channels_last))
        return logits.float(), labels


def _require_possible(config: ImageNetRunConfig, classes: int, images: int) -> None:
    """Raise `UsageError` unless the classifier can train on batches of `images` images of `data.resolution`."""
    name, resolution = config.model.name, config.data.resolution
    reason = why_refused(name, classes, images, resolution)
    if reason is None:
        return
    if why_refused(name, classes, 2 * images, resolution) is None:
        raise UsageError(
            f"{name} cannot train on batches of {images} at {resolution} pixels ({reason}); "
            "set training.batch_size and training.micro_batch_size to 2 or more"
        )
    fitting = [size for size in _USUAL_RESOLUTIONS if why_refused(name, classes, 2, size) is None]
    advice = f"set data.resolution={fitting[0]}" if fitting else "choose another data.resolution"
    raise UsageError(f"{name} cannot take images of {resolution} pixels ({reason}); {advice}")


def _right_among_top(logits: Tensor, labels: Tensor) -> Tensor:
    """Count the labels (n,) that are the largest, and among the five largest logits (n, classes); shape (2,)."""
    top = logits.topk(min(_TOP, logits.shape[1]), dim=1).indices
    hits = top == labels[:, None]
    return torch.stack([hits[:, 0].sum(), hits.sum()])


def _or_one_unknown(batch: Batch) -> Batch:
    """Replace an empty batch by one dummy image: the forward pass of a sharded model is a collective."""
    images, labels = batch
    if len(labels):
        return batch
    return images.new_zeros((1, *images.shape[1:])), labels.new_full((1,), _UNKNOWN)


def _accuracies(right: Sequence[float], seen: float) -> dict[str, float]:
    first, among_top = right
    return {"accuracy": first / seen, "top5_accuracy": among_top / seen}
