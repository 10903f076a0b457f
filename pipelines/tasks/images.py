"""Classification of images."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.tasks.description import TaskDescription
from pipelines.tasks.metric import ACCURACY, LOSS

if TYPE_CHECKING:
    import torch

    from pipelines.config import ImageRunConfig
    from pipelines.training.checkpoint import Checkpoint
    from pipelines.training.distributed import Ranks
    from pipelines.training.task import Task


def _open_data(folder: Path) -> object:
    from pipelines.data.images.image_sets import open_images

    return open_images(folder)


def _build(config: ImageRunConfig, device: torch.device, ranks: Ranks) -> Task:
    from pipelines.training.image_task import ImageTask  # takes a second to import, with torchvision

    return ImageTask(config, device, ranks)


def _length(config: ImageRunConfig) -> Fraction:
    from pipelines.data.images.manifest import load_image_manifest

    images = sum(each.train for each in load_image_manifest(Path(config.data.folder)).classes)
    return Fraction(str(config.training.epochs)) * images


def _export_to_torchvision(checkpoint: Checkpoint, config: ImageRunConfig, folder: Path, out: Path) -> str:
    from pipelines.exchange.classifier_export import write_classifier  # takes a second to import

    return write_classifier(checkpoint, config, folder, out)


IMAGES = TaskDescription(
    name="images",
    summary="Train a classifier of images.",
    examples=(
        "asgo train images --data data/mine --model resnet18 --optimizer asgo",
        "asgo train images --preset mnist-mlp --optimizer muon",
        "asgo train images --preset cifar10-resnet --set data.mixup=0.2",
        "asgo train images --resume --out runs/images-asgo-s42",
    ),
    model="a classifier of images",
    unit="images",
    short_unit="img",
    samples="Images",
    data="Images, made by `asgo data images` or `asgo data imagenet`",
    presets=("images", "cifar10-resnet", "mnist-mlp", "imagenette-resnet18", "asro-imagenet"),
    options=frozenset({"model", "workers"}),
    open_data=_open_data,
    build=_build,
    units_per_sample=lambda config: 1,
    length=_length,
    exporters={"torchvision": _export_to_torchvision},
    metrics=(ACCURACY, LOSS),
)

IMAGENET = replace(
    IMAGES,
    command="imagenet",
    summary="Train a classifier on ImageNet.",
    examples=(
        "asgo train imagenet --optimizer accasro",
        "asgo train imagenet --model resnet50 --optimizer asgo",
        "asgo train imagenet --optimizer asro --gpus 8 --dry-run",
    ),
    data="Images, made by `asgo data imagenet`",
    presets=("asro-imagenet", *(name for name in IMAGES.presets if name != "asro-imagenet")),
)
"""The same task under the name of its largest data set, with that one's preset as the default."""
