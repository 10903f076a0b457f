"""An exported classifier is the same function in torchvision, by what lies in the folder alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn

from models.vision import build_classifier
from pipelines.data.images.transforms import Normalize
from pipelines.exchange.export import export_model
from pipelines.resolve import Layer, preset_layer, resolve
from pipelines.tensors import model_tensors
from pipelines.training.checkpoint import Snapshot, write_snapshot

CLASSES = [["n01440764", "tench"], ["n01443537", "goldfish"], ["n01484850", "great white shark"]]


def save(folder: Path, name: str, **settings: Any) -> tuple[nn.Module, Path]:
    """A checkpoint of a classifier whose weights and statistics are random, as a run writes it; and the classifier."""
    torch.manual_seed(0)
    model = build_classifier(name, len(CLASSES))
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    values = {f"data.{key}": value for key, value in settings.items()}
    layer = Layer("test", {"model.name": name, "data.folder": "nowhere", "training.steps": 1, **values})
    config = resolve([preset_layer("images", "asro-imagenet"), layer])
    content = {
        "format": 1, "step": 1, "config": config.model_dump(mode="json"),
        "data": {"fingerprint": "f", "classes": CLASSES}, "optimizer_scalars": {},
    }  # fmt: skip
    snapshot = Snapshot(1, {"model.safetensors": model_tensors(model)}, [], content)
    folder.mkdir(parents=True, exist_ok=True)
    return model.eval(), write_snapshot(folder, snapshot, keep=1)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "googlenet"])
def test_torchvision_loads_it_and_sees_the_same(name: str, tmp_path: Path) -> None:
    ours, checkpoint = save(tmp_path, name)
    export_model(checkpoint, "torchvision", tmp_path / "out")
    description = json.loads((tmp_path / "out/description.json").read_text())
    theirs = torchvision.models.get_model(description["model"], weights=None, **description["arguments"])
    theirs.load_state_dict(load_file(tmp_path / "out/model.safetensors"))
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(theirs.eval()(images), ours(images))
    assert [[each["id"], each["name"]] for each in description["classes"]] == CLASSES


@pytest.mark.parametrize(
    ("settings", "resize", "resolution"),
    [({"transform": "standard", "resolution": 224}, 256, 224), ({"transform": "paper", "resolution": 208}, 208, 208)],
    ids=["standard", "paper"],
)
def test_it_says_what_the_images_went_through(
    settings: dict[str, Any], resize: int, resolution: int, tmp_path: Path
) -> None:
    _, checkpoint = save(tmp_path, "squeezenet1_1", **settings)
    export_model(checkpoint, "torchvision", tmp_path / "out")
    description = json.loads((tmp_path / "out/description.json").read_text())
    assert (description["resize"], description["resolution"]) == (resize, resolution)
    pixels = torch.randint(256, (1, 3, 8, 8), dtype=torch.uint8)
    seen = torchvision.transforms.Normalize(description["mean"], description["std"])(pixels / 255)
    torch.testing.assert_close(seen, Normalize()(pixels))
