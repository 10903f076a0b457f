"""A compiled model trains like one that is not, and its checkpoints are the same."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.config import RunConfig
from pipelines.data.batches import ValidationBatches, open_token_data
from pipelines.data.imagenet.importer import prepare_imagenet
from pipelines.resolve import Layer, preset_layer, resolve
from pipelines.training.checkpoint import open_checkpoint
from pipelines.training.train import train
from tests.conftest import SilentReporter
from tests.long import long
from tests.pipelines.data.imagenet.archive_makers import pictures, write_archives


@long
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_model_trains_alike(
    small_config: Callable[..., RunConfig], tmp_path: Path, reporter: SilentReporter
) -> None:
    runs = {}
    for compiled in (False, True):
        config = small_config(runtime__compile=compiled, training__steps=2, evaluation__every=2)
        runs[compiled] = train(config, tmp_path / str(compiled), reporter)
    for plain, compiled_row in zip(runs[False], runs[True], strict=True):
        # Sums in another order: 84 roundings of a float32. A wrong kernel shows in the first digits.
        assert plain["loss"] == pytest.approx(compiled_row["loss"], rel=1e-5)
    one, other = (
        open_checkpoint(tmp_path / str(c) / "checkpoints/step-00000002").model_tensors() for c in (False, True)
    )
    assert one.keys() == other.keys()


class Graphs:
    """A backend of torch.compile that keeps the graphs, and runs them as they are."""

    def __init__(self) -> None:
        self.batch_sizes: dict[bool, set[Any]] = {True: set(), False: set()}
        """Sizes of the first dimension of the graphs' tokens or images, for training and for validation."""

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        tensors = [each for each in inputs if isinstance(each, torch.Tensor)]
        batches = [each for each in tensors if each.dtype == torch.int64 or each.ndim == 4]
        self.batch_sizes[torch.is_grad_enabled()] |= {each.shape[0] for each in batches}
        return graph.forward


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    backend = Graphs()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch.compiler.reset()
    yield backend
    torch.compiler.reset()


def test_a_smaller_last_validation_batch_is_padded_and_no_graph_is_dynamic(
    graphs: Graphs, small_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    whole = {"training__batch_size": 5, "evaluation__batches": 1000, "training__steps": 2, "evaluation__every": 2}
    plain = train(small_config(**whole), tmp_path / "plain", SilentReporter())
    compiled = train(small_config(**whole, runtime__compile=True), tmp_path / "compiled", SilentReporter())
    batches = len(ValidationBatches(open_token_data(Path(small_config().data.folder)), 16, None))
    assert batches % 5
    assert graphs.batch_sizes == {True: {5}, False: {5}}
    assert all(type(size) is int for sizes in graphs.batch_sizes.values() for size in sizes)
    assert [row["loss"] for row in compiled] == pytest.approx([row["loss"] for row in plain], rel=1e-6)


def test_validation_batches_of_images_have_one_size_also_where_images_are_left_out(
    graphs: Graphs, tmp_path: Path
) -> None:
    archives = write_archives(tmp_path / "archives", pictures(2, 8, 5, (40, 30)), kit="map_clsloc.txt")
    prepare_imagenet(archives, tmp_path / "data", extract=True, report=lambda *_: None)
    bad = next((tmp_path / "data" / "val" / "n01440764").iterdir())
    bad.write_bytes(b"x" * bad.stat().st_size)
    settings = {
        "data.folder": str(tmp_path / "data"),
        "data.resolution": 16,
        "data.bad_images": "skip",
        "model.name": "mlp",
        "optimizer.name": "adam",
        "training.steps": 1,
        "training.batch_size": 4,
        "evaluation.every": 1,
        "runtime.device": "cpu",
        "runtime.workers": 1,
    }
    rows = {}
    for compiled in (False, True):
        layer = Layer("test", {**settings, "runtime.compile": compiled})
        config = resolve([preset_layer("images", "images"), layer])
        rows[compiled] = train(config, tmp_path / str(compiled), SilentReporter())
    assert graphs.batch_sizes == {True: {4}, False: {4}}
    for plain, row in zip(*rows.values(), strict=True):
        assert row["accuracy"] == plain["accuracy"]
        assert row["loss"] == pytest.approx(plain["loss"], rel=1e-6)
