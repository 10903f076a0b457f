"""Which task a configuration asks for."""

from __future__ import annotations

import torch

from pipelines.config import GPTRunConfig, ImageNetRunConfig, RunConfig
from pipelines.training.gpt_task import GPTTask
from pipelines.training.task import Task


def build_task(config: RunConfig, device: torch.device) -> Task:
    """Open the data and build the model. Raises as the task does."""
    match config:
        case GPTRunConfig():
            return GPTTask(config, device)
        case ImageNetRunConfig():
            from pipelines.training.imagenet_task import ImageNetTask  # takes a second to import, with torchvision

            return ImageNetTask(config, device)
    raise AssertionError(f"a configuration of no task: {type(config).__name__}")
