"""Image classification as a task of the training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from models.vision import build_classifier
from pipelines.config import ImageNetRunConfig
from pipelines.data.imagenet.image_workers import ImageWorkers, Source
from pipelines.data.imagenet.images import open_imagenet
from pipelines.data.imagenet.loader import TrainingImages, ValidationImages
from pipelines.data.imagenet.transforms import build_transforms, normalize
from pipelines.errors import UsageError
from pipelines.training.device import autocast, pick_precision
from pipelines.training.task import Batch

_TOP = 5


class ImageNetTask:
    """Images, a classifier of torchvision, and the mean cross-entropy of the classes in nats."""

    tokens_per_sample = 1

    def __init__(self, config: ImageNetRunConfig, device: torch.device) -> None:
        """Raises `AsgoError` for a folder that cannot be read, `UsageError` for a classifier that there is not."""
        training = config.training
        self.data = open_imagenet(Path(config.data.folder))
        try:
            model = build_classifier(config.model.name, len(self.data.classes))
        except ValueError as error:
            raise UsageError(f"model.name: {error}") from None
        self._channels_last = config.model.channels_last
        layout = torch.channels_last if self._channels_last else torch.contiguous_format
        self.model = model.to(device, memory_format=layout)  # type: ignore[call-overload]
        self._device = device
        self._dtype = pick_precision(training, device)
        self._label_smoothing = training.label_smoothing
        self._micro_batch_size = training.micro_batch_size or training.batch_size
        self._evaluation_batches = config.evaluation.batches
        self._parts = [
            slice(start, start + self._micro_batch_size)
            for start in range(0, training.batch_size, self._micro_batch_size)
        ]
        self._open_images(config, device)
        self._right = torch.zeros(2, device=device)
        self._seen = 0

    def _open_images(self, config: ImageNetRunConfig, device: torch.device) -> None:
        train, validation = build_transforms(config.data.transform, config.data.resolution)
        exact, skips = not config.data.reduced_decoding, config.data.bad_images == "skip"
        sources = {
            "train": Source(self.data.train, train, config.seed, "replace" if skips else "stop", exact),
            "validation": Source(self.data.validation, validation, 0, "leave out" if skips else "stop", exact),
        }
        self._workers = ImageWorkers(sources, config.runtime.workers, pinned=device.type == "cuda")
        self._train = TrainingImages(self._workers, "train", config.training.batch_size, self._parts)
        self._validation = ValidationImages(self._workers, "validation", self._micro_batch_size)

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """(images, labels): uint8 (micro_batch_size, 3, resolution, resolution), int64 (micro_batch_size,)."""
        self._right.zero_()
        self._seen = 0
        for part in self._parts:
            yield self._train.batch(step, part)

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy of a micro-batch, shape ()."""
        logits, labels = self._classify(batch)
        self._right += _right_among_top(logits.detach(), labels)
        self._seen += len(labels)
        return functional.cross_entropy(logits, labels, label_smoothing=self._label_smoothing)

    def training_figures(self) -> dict[str, float]:
        """Top-1 and top-5 accuracy over the micro-batches of the step just made. Waits for the device."""
        return _accuracies(self._right, self._seen)

    @torch.no_grad()
    def evaluate(self, should_stop: Callable[[], bool]) -> dict[str, float] | None:
        """Mean loss, without label smoothing, and accuracies over the validation images."""
        sums = torch.zeros(3, dtype=torch.float32 if self._device.type == "mps" else torch.float64)
        sums, seen = sums.to(self._device), 0
        self.model.eval()
        for number, batch in enumerate(self._validation):
            if number == self._evaluation_batches:
                break
            if should_stop():
                self.model.train()
                return None
            logits, labels = self._classify(batch)
            sums[0] += functional.cross_entropy(logits, labels, reduction="sum")
            sums[1:] += _right_among_top(logits, labels)
            seen += len(labels)
        self.model.train()
        return {"loss": sums[0].item() / seen, **_accuracies(sums[1:], seen)}

    def epoch_at(self, step: int) -> float:
        """Passes over the training images after `step` steps."""
        return self._train.epoch_at(step)

    def description(self) -> dict[str, Any]:
        """The data's fingerprint, and its classes by wnid and name."""
        classes = [[each.wnid, each.name] for each in self.data.classes]
        return {"fingerprint": self.data.fingerprint, "classes": classes}

    def notes(self) -> list[str]:
        """How many images could not be decoded, and one of them."""
        lines = []
        for part, skipped in (("training", self._train.skipped), ("validation", self._validation.skipped)):
            if skipped:
                first = next(iter(skipped.values()))
                lines.append(f"{part} images that were skipped: {len(skipped):,}, the first of them {first}")
        return lines

    def close(self) -> None:
        """End the processes that make the batches."""
        self._workers.close()

    def _classify(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits in float32, (n, classes), and labels (n,), on the model's device."""
        images, labels = (part.to(self._device, non_blocking=True) for part in batch)
        with autocast(self._device, self._dtype):
            logits = self.model(normalize(images, channels_last=self._channels_last))
        return logits.float(), labels


def _right_among_top(logits: Tensor, labels: Tensor) -> Tensor:
    """How many labels (n,) are the first, and among the first five, of the logits (n, classes): (2,)."""
    top = logits.topk(min(_TOP, logits.shape[1]), dim=1).indices
    hits = top == labels[:, None]
    return torch.stack([hits[:, 0].sum(), hits.sum()])


def _accuracies(right: Tensor, seen: int) -> dict[str, float]:
    first, among_top = right.tolist()
    return {"accuracy": first / seen, "top5_accuracy": among_top / seen}
