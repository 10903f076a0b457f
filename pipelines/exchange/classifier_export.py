"""Export a classifier: weights with torchvision's names, and a description of model, images and classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch

from models.vision import OWN_CLASSIFIERS, build_classifier
from pipelines.config import ImageRunConfig
from pipelines.data.images.transforms import MEAN, STD, build_transforms
from pipelines.errors import UsageError
from pipelines.shell import command
from pipelines.tensors import model_tensors, require_same_names
from pipelines.training.checkpoint import Checkpoint


def write_classifier(checkpoint: Checkpoint, config: ImageRunConfig, folder: Path, out: Path) -> str:
    """Write weights and description into `folder`; returns a command that loads them from `out`, its final path.

    Raises `UsageError` if torchvision does not have the model, and `AsgoError` if the weights do not fit it.
    """
    if config.model.name in OWN_CLASSIFIERS:
        raise UsageError(
            f"{checkpoint.folder}: torchvision does not have {config.model.name}; its weights are "
            f"{checkpoint.folder / 'model.safetensors'}, for models.vision.build_classifier"
        )
    data = checkpoint.state["data"]
    classes = data["classes"]
    tensors = checkpoint.model_tensors()
    model = build_classifier(config.model.name, len(classes))
    require_same_names(model_tensors(model), tensors, str(checkpoint.folder))
    # Trap: files of `save_file` are readable by their owner only.
    (folder / "model.safetensors").write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))
    arguments: dict[str, Any] = {"num_classes": len(classes)}
    if hasattr(model, "aux_logits"):  # GoogLeNet and Inception, built without auxiliary outputs
        arguments |= {"aux_logits": False, "init_weights": False}
    # Checkpoints of earlier versions do not have `inputs`; their settings have no defaults that depend on the data.
    settings = {"mean": MEAN, "std": STD, **config.data.model_dump(exclude_none=True), **data.get("inputs", {})}
    _, seen = build_transforms(settings["transform"], settings["resolution"])
    mean, std = (list(settings[key]) * (3 // len(settings[key])) for key in ("mean", "std"))
    description = {
        "model": config.model.name,
        "arguments": arguments,
        "resize": seen.resize,
        "resolution": seen.size,
        "interpolation": "bilinear",
        "mean": mean,
        "std": std,
        "classes": [{"id": class_id, "name": name} for class_id, name in classes],
    }
    text = json.dumps(description, indent=1, ensure_ascii=False) + "\n"
    (folder / "description.json").write_text(text, encoding="utf-8")
    keywords = ", ".join(f"{key}={value}" for key, value in arguments.items())
    weights = f"safetensors.torch.load_file({str(out / 'model.safetensors')!r})"
    return command(
        "python",
        "-c",
        "import safetensors.torch, torchvision; "
        f"torchvision.models.{config.model.name}({keywords}).load_state_dict({weights})",
    )
