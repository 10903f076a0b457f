"""Which task a configuration asks for."""

from __future__ import annotations

import torch

from pipelines.config import GPTRunConfig, ImageNetRunConfig, RunConfig
from pipelines.training.distributed import ALONE, Ranks
from pipelines.training.gpt_task import GPTTask
from pipelines.training.task import Task


def build_task(config: RunConfig, device: torch.device, ranks: Ranks = ALONE) -> Task:
    """Open the data and build the model, of which this process has its share. Raises as the task does."""
    match config:
        case GPTRunConfig():
            return GPTTask(config, device, ranks)
        case ImageNetRunConfig():
            from pipelines.training.imagenet_task import ImageNetTask  # takes a second to import, with torchvision

            return ImageNetTask(config, device, ranks)
    raise AssertionError(f"a configuration of no task: {type(config).__name__}")
