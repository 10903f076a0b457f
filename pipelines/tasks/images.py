"""Classification of images."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.tasks.description import TaskDescription
from pipelines.tasks.metric import ACCURACY, LOSS

if TYPE_CHECKING:
    import torch

    from pipelines.config import ImageNetRunConfig
    from pipelines.training.checkpoint import Checkpoint
    from pipelines.training.distributed import Ranks
    from pipelines.training.task import Task


def _open_data(folder: Path) -> object:
    from pipelines.data.images.image_sets import open_images

    return open_images(folder)


def _build(config: ImageNetRunConfig, device: torch.device, ranks: Ranks) -> Task:
    from pipelines.training.imagenet_task import ImageNetTask  # takes a second to import, with torchvision

    return ImageNetTask(config, device, ranks)


def _length(config: ImageNetRunConfig) -> Fraction:
    from pipelines.data.images.manifest import load_image_manifest

    images = sum(each.train for each in load_image_manifest(Path(config.data.folder)).classes)
    return Fraction(str(config.training.epochs)) * images


def _export_to_torchvision(checkpoint: Checkpoint, config: ImageNetRunConfig, folder: Path, out: Path) -> str:
    from pipelines.exchange.classifier_export import write_classifier  # takes a second to import

    return write_classifier(checkpoint, config, folder, out)


IMAGES = TaskDescription(
    name="imagenet",
    summary="Train a classifier on ImageNet.",
    examples=(
        "asgo train imagenet --optimizer accasro",
        "asgo train imagenet --model resnet50 --optimizer asgo",
        "asgo train imagenet --optimizer asro --gpus 8 --dry-run",
    ),
    model="a classifier of torchvision",
    unit="images",
    short_unit="img",
    samples="Images",
    data="Images, made by `asgo data imagenet`",
    presets=("asro-imagenet",),
    options=frozenset({"model", "workers"}),
    open_data=_open_data,
    build=_build,
    units_per_sample=lambda config: 1,
    length=_length,
    exporters={"torchvision": _export_to_torchvision},
    metrics=(ACCURACY, LOSS),
)
