"""Image classification as a task of the training loop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.vision import build_classifier, takes_channels, why_refused
from pipelines.config import ImageRunConfig
from pipelines.data.images.image_sets import open_images
from pipelines.data.images.inputs import Inputs, inputs_of, random_changes
from pipelines.data.images.loader import open_loaders
from pipelines.data.images.transforms import Normalize, build_transforms
from pipelines.data.images.workers import ImageSource
from pipelines.errors import AsgoError, UsageError
from pipelines.training.device import autocast, pick_precision
from pipelines.training.distributed import ALONE, Ranks, local_batch, rounds
from pipelines.training.mixing import Mixing
from pipelines.training.parallel import place_model
from pipelines.training.task import Batch

_TOP = 5
_USUAL_RESOLUTIONS = (32, 64, 128, 224, 256, 299, 384, 512)
_UNKNOWN = -100
"""Label of a dummy image, which the metrics ignore."""


class ImageTask:
    """Images, a classifier, and the mean cross-entropy of the classes in nats."""

    tokens_per_sample = 1

    def __init__(self, config: ImageRunConfig, device: torch.device, ranks: Ranks = ALONE) -> None:
        """Raises `AsgoError` if the data folder cannot be read.

        Raises `UsageError` if the classifier does not exist or does not accept the images, if settings do not fit the
        data, or if the batch does not divide equally among the ranks.
        """
        training = config.training
        self._rows = local_batch(training, ranks)
        self.data = open_images(Path(config.data.folder))
        self.inputs = inputs_of(config.data, self.data)
        classes, channels = len(self.data.classes), takes_channels(config.model.name, self.inputs.channels)
        try:
            _require_possible(config, self.inputs, classes, self._rows.micro_batch_size * ranks.size)
            sizes = config.model.sizes
            model = build_classifier(config.model.name, classes, channels, self.inputs.resolution, sizes)
        except ValueError as error:
            raise UsageError(f"model.{error}") from None
        channels_last = config.model.channels_last
        model = model.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        self.model = place_model(model, device, ranks, config.runtime)
        self.network: nn.Module = self.model
        self._normalize = Normalize(
            self.inputs.mean, self.inputs.std, device, channels=channels, channels_last=channels_last
        )
        self._ranks = ranks
        self._device = device
        self._dtype = pick_precision(training, device)
        self._label_smoothing = training.label_smoothing
        self._mixing: Mixing | None = None
        if config.data.mixup or config.data.cutmix:
            alphas = config.data.mixup, config.data.cutmix
            self._mixing = Mixing(*alphas, classes, config.seed, training.batch_size)
        self._open_images(config, device)
        self._right = torch.zeros(2, device=device)
        self._seen = 0
        self._step = 0

    def _open_images(self, config: ImageRunConfig, device: torch.device) -> None:
        settings, seen = config.data, self.inputs
        crop, centre_crop = build_transforms(seen.transform, seen.resolution, settings.flip)
        shift, distortion = random_changes(settings, seen, config.seed, len(self.data.train))
        skips, exact = settings.bad_images == "skip", not settings.reduced_decoding
        images = len(self.data.validation)
        count = min(images, config.validation_samples or images)
        self._train, self._validation, self._workers = open_loaders(
            ImageSource(self.data.train, crop, config.seed, "replace" if skips else "stop", exact, shift, distortion),
            ImageSource(self.data.validation, centre_crop, 0, "leave out" if skips else "stop", exact),
            config.training.batch_size,
            [self._rows_of(part) for part in self._rows.micro_batches],
            list(rounds(count, self._rows.micro_batch_size, self._ranks)),
            config.runtime.workers,
            pinned=device.type == "cuda",
        )

    def _rows_of(self, micro_batch: slice) -> slice | Sequence[int]:
        """Return the rows of the global batch that a micro-batch needs."""
        return micro_batch if self._mixing is None else self._mixing.rows(micro_batch)

    def load_initial_weights(self) -> list[str]:
        """Do nothing: a classifier begins with random weights."""
        return []

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """Yield (images, labels): uint8 (n, channels, resolution, resolution), int64 (n,).

        n is `micro_batch_size`; with mixup or CutMix, there may be one row more, before the others.
        """
        self._right.zero_()
        self._seen = 0
        self._step = step
        for rows in self._rows.micro_batches:
            yield self._train.batch(step, self._rows_of(rows))

    def loss(self, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of a micro-batch, shape (); with the probabilities of mixed images.

        The accuracy of mixed images is that of the label with the larger weight.
        """
        images, targets = self._on_device(batch)
        with autocast(self._device, self._dtype):
            seen = self._normalize(images)
            if self._mixing is not None:
                seen, targets = self._mixing(seen, targets, self._step, self._rows.micro_batch_size)
            logits = self.network(seen).float()
        labels = targets if self._mixing is None else targets.argmax(1)
        self._right += _right_among_top(logits.detach(), labels)
        self._seen += len(labels)
        return functional.cross_entropy(logits, targets, label_smoothing=self._label_smoothing)

    @contextlib.contextmanager
    def probing(self) -> Iterator[None]:
        """Context manager in which `micro_batches` and `loss` do not count for `training_metrics`."""
        before = self._right, self._seen, self._step
        self._right = torch.zeros_like(self._right)
        try:
            yield
        finally:
            self._right, self._seen, self._step = before

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
            images, labels = self._on_device(_or_one_unknown(batch))
            with autocast(self._device, self._dtype):
                logits = self.network(self._normalize(images)).float()
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
        """Return the data's fingerprint, ids and names of its classes, and what the network sees of it."""
        classes = [[each.id, each.name] for each in self.data.classes]
        return {"fingerprint": self.data.fingerprint, "classes": classes, "inputs": asdict(self.inputs)}

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

    def _on_device(self, batch: Batch) -> Batch:
        return tuple(part.to(self._device, non_blocking=True) for part in batch)


def _require_possible(config: ImageRunConfig, inputs: Inputs, classes: int, images: int) -> None:
    """Raise `UsageError` unless the classifier can train on batches of `images` images of this size.

    Raises `ValueError` if it cannot be built.
    """
    name, resolution = config.model.name, inputs.resolution
    refusal = partial(why_refused, name, classes, channels=takes_channels(name, inputs.channels))
    reason = refusal(images, resolution, sizes=config.model.sizes)
    if reason is None:
        return
    if refusal(2 * images, resolution, sizes=config.model.sizes) is None:
        raise UsageError(
            f"{name} cannot train on batches of {images} at {resolution} pixels ({reason}); "
            "set training.batch_size and training.micro_batch_size to 2 or more"
        )
    fitting = [size for size in _USUAL_RESOLUTIONS if refusal(2, size) is None]
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
