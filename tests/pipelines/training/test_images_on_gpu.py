"""What images do on a GPU, on fake CUDA tensors: no waits, no copies, channels last."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pipelines.config import ImageRunConfig
from pipelines.resolve import Layer, preset_layer, resolve
from pipelines.training import image_task
from pipelines.training.image_task import ImageTask
from tests.optim.test_launches import Log
from tests.pipelines.data.images.decoded_folders import stripes, write_decoded

SIZE, ROWS = 16, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images")
    write_decoded(path, {"train": stripes(2 * ROWS), "val": stripes(ROWS, seed=1)})
    return path


@pytest.fixture
def on_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function that builds the task on a fake GPU, without its loaders."""
    monkeypatch.setattr(ImageTask, "_open_images", lambda *_: None)

    def build(**changes: Any) -> ImageTask:
        values = {key.replace("__", "."): value for key, value in changes.items()}
        settings = {"data.folder": str(folder), "training.batch_size": ROWS, "training.precision": "bf16", **values}
        config = resolve([preset_layer("images", "cifar10-resnet"), Layer("test", settings)])
        assert isinstance(config, ImageRunConfig)
        return ImageTask(config, torch.device("cuda"))

    with FakeTensorMode(allow_non_fake_inputs=True):
        yield build


def batch() -> tuple[Tensor, Tensor]:
    """Images as the loader lays them out, already on the GPU."""
    images = torch.zeros(ROWS, SIZE, SIZE, 3, dtype=torch.uint8, device="cuda").permute(0, 3, 1, 2)
    return images, torch.zeros(ROWS, dtype=torch.int64, device="cuda")


@pytest.mark.parametrize("mixing", [{}, {"data__mixup": 0.2}, {"data__cutmix": 1.0}])
def test_a_micro_batch_waits_for_nothing_and_copies_nothing(mixing: dict[str, Any], on_gpu: Any) -> None:
    task = on_gpu(**mixing)
    with Log() as log:
        task.loss(batch())
        counts = task.training_counts()
    assert log.waits == []
    assert log.launches["convolution"] > 5
    assert counts.device.type == "cuda"


@pytest.mark.parametrize(("setting", "expected"), [("auto", True), (False, False)])
def test_channels_are_last_by_default(setting: Any, expected: bool, on_gpu: Any) -> None:
    task = on_gpu(model__channels_last=setting)
    kernels = [param for param in task.model.parameters() if param.ndim == 4 and param.shape[1] > 1]
    assert {each.is_contiguous(memory_format=torch.channels_last) for each in kernels} == {expected}
    assert {each.is_contiguous() for each in kernels} == {not expected}
    images = task._normalize(batch()[0])
    assert images.is_contiguous(memory_format=torch.channels_last) == expected


def test_padding_makes_no_copies(on_gpu: Any) -> None:
    images, labels = batch()
    with Log() as log:
        padded, padded_labels = image_task._padded((images[:1], labels[:1]), ROWS)
    assert log.waits == []
    assert padded.shape == images.shape
    assert padded_labels.shape == labels.shape
