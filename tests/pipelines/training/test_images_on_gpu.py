"""What images do on a GPU, on fake CUDA tensors: no waits, no copies, channels last."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.transforms import v2

from pipelines.config import ImageRunConfig
from pipelines.resolve import Layer, preset_layer, resolve
from pipelines.training import image_task
from pipelines.training.image_task import ImageTask
from tests.optim.test_launches import Log
from tests.pipelines.data.images.decoded_folders import stripes, write_decoded

SIZE, ROWS = 16, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "data"
    write_decoded(path, {"train": stripes(2 * ROWS), "val": stripes(ROWS, seed=1)})
    return path


@pytest.fixture
def build(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that builds the task for a GPU, without its loaders, and leaves the model where it is."""
    monkeypatch.setattr(ImageTask, "_open_images", lambda *_: None)
    monkeypatch.setattr(image_task, "_require_possible", lambda *_: None)
    monkeypatch.setattr(image_task, "place_model", lambda model, *_: model)

    def build_task(**changes: Any) -> ImageTask:
        values = {key.replace("__", "."): value for key, value in changes.items()}
        settings = {"data.folder": str(folder), "training.batch_size": ROWS, "training.precision": "fp32", **values}
        config = resolve([preset_layer("images", "cifar10-resnet"), Layer("test", settings)])
        assert isinstance(config, ImageRunConfig)
        return ImageTask(config, torch.device("cuda"))

    return build_task


@pytest.fixture
def fake() -> Iterator[None]:
    """Fake tensors, on a GPU by default. `Module.to` cannot move them."""
    with FakeTensorMode(), torch.device("cuda"):
        yield


def batch() -> tuple[Tensor, Tensor]:
    """Images as the loader lays them out, already on the GPU."""
    images = torch.zeros(ROWS, SIZE, SIZE, 3, dtype=torch.uint8, device="cuda").permute(0, 3, 1, 2)
    return images, torch.zeros(ROWS, dtype=torch.int64, device="cuda")


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("mixing", [{}, {"data__mixup": 0.2}, {"data__cutmix": 1.0}])
def test_a_micro_batch_waits_for_nothing_and_copies_nothing(
    mixing: dict[str, Any], build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Random numbers are drawn on the host; fake tensors have none.
    monkeypatch.setattr(torch.distributions, "Beta", lambda *_: None)
    monkeypatch.setattr(v2, "RandomChoice", lambda transforms: transforms[0])
    monkeypatch.setattr(v2.MixUp, "make_params", lambda *_: {"lam": 0.3})
    monkeypatch.setattr(v2.CutMix, "make_params", lambda *_: {"lam_adjusted": 0.3, "box": (1, 2, 8, 9)})
    monkeypatch.setattr("pipelines.training.mixing.seeded", lambda *_: nullcontext())
    task = build(model__channels_last=False, **mixing)
    with Log() as log:
        task.loss(batch())
        counts = task.training_counts()
    assert log.waits == []
    assert log.launches["convolution"] > 5
    assert counts.device.type == "cuda"


@pytest.mark.parametrize(
    ("settings", "images_last", "weights_last"),
    [
        ({}, True, True),
        ({"model__channels_last": False}, False, False),
        ({"runtime__shard_model": True}, True, False),  # FSDP2 refuses weights that are not contiguous
    ],
)
def test_channels_are_last_by_default(
    settings: dict[str, Any], images_last: bool, weights_last: bool, build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def normalize(*args: Any, **keywords: Any) -> None:
        assert keywords["channels_last"] == images_last

    monkeypatch.setattr(image_task, "Normalize", normalize)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None, **others: zeros(*size, **others))  # there is no GPU
    kernels = [param for param in build(**settings).model.parameters() if param.ndim == 4 and param.shape[2] > 1]
    assert kernels
    assert {each.is_contiguous(memory_format=torch.channels_last) for each in kernels} == {weights_last}
    assert {each.is_contiguous() for each in kernels} == {not weights_last}


@pytest.mark.usefixtures("fake")
def test_padding_makes_no_copies() -> None:
    images, labels = batch()
    with Log() as log:
        padded, padded_labels = image_task._padded((images[:1], labels[:1]), ROWS)
    assert log.waits == []
    assert padded.shape == images.shape
    assert padded_labels.shape == labels.shape
