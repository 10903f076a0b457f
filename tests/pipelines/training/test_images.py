"""Classification of decoded and encoded images of any data set, by our own models and those of torchvision."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from models.vision import OWN_CLASSIFIERS
from pipelines.analysis.comparison.read_runs import read_runs
from pipelines.config import RunConfig, load_run_config
from pipelines.data.imagenet.importer import prepare_imagenet
from pipelines.errors import RunInterrupted, UsageError
from pipelines.exchange.export import export_model
from pipelines.resolve import Layer, preset_layer
from pipelines.steps import resolve_run
from pipelines.training.checkpoint import newest_checkpoint
from pipelines.training.lineage import BranchPoint
from pipelines.training.metrics import Row, read_lines
from pipelines.training.run_folder import RunFolder
from pipelines.training.statistics_file import read_statistics
from pipelines.training.train import plan, train
from tests.conftest import SilentReporter
from tests.long import long
from tests.pipelines.data.imagenet.archive_makers import pictures, write_archives
from tests.pipelines.data.images.decoded_folders import stripes, write_decoded
from tests.pipelines.training.double_precision import bound, double_precision
from tests.pipelines.training.processes import Job, carry_out

pytestmark = pytest.mark.usefixtures("forked_children")

SMALL: dict[str, Any] = {
    "model.name": "mlp",
    "model.widths": [32],
    "optimizer.name": "adam",
    "training.steps": 6,
    "training.batch_size": 8,
    "evaluation.every": 3,
    "checkpoint.every": 2,
    "runtime.device": "cpu",
    "runtime.workers": 1,
}
EVERYTHING = {
    "data.randaugment": 2,
    "data.erasing": 0.5,
    "data.mixup": 0.2,
    "data.cutmix": 1.0,
    "training.label_smoothing": 0.1,
    "training.micro_batch_size": 4,
}
"""All random changes of training images."""

Make = Callable[..., RunConfig]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Four classes: decoded images of 16 pixels, in colour and gray, and photographs."""
    root = tmp_path_factory.mktemp("images")
    for name, channels in (("colour", 3), ("gray", 1)):
        splits = {"train": stripes(60, channels=channels), "val": stripes(20, channels=channels, seed=1)}
        write_decoded(root / name, splits)
    archives = write_archives(root / "archives", pictures(4, 8, 3, (40, 30)), kit="map_clsloc.txt")
    prepare_imagenet(archives, root / "photographs", extract=True, report=lambda *_: None)
    return {name: root / name for name in ("colour", "gray", "photographs")}


@pytest.fixture
def make(folders: Mapping[str, Path]) -> Make:
    """The configuration of a small run; keywords are dotted keys with `__` for the dot."""

    def build(data: str = "colour", settings: Mapping[str, Any] = {}, **changes: Any) -> RunConfig:
        values = {key.replace("__", "."): value for key, value in changes.items()}
        flags = {**SMALL, "data.folder": str(folders[data]), **settings, **values}
        if flags["model.name"] != "mlp":
            del flags["model.widths"]
        return resolve_run([preset_layer("images", "images"), Layer("test", flags)])

    return build


def run(config: RunConfig, out: Path, resume: bool = False) -> tuple[list[Row], dict[str, torch.Tensor]]:
    rows = train(config, out, SilentReporter(), resume=resume)
    checkpoint, _ = newest_checkpoint(out / "checkpoints")
    assert checkpoint is not None
    return rows, checkpoint.model_tensors()


def figures(rows: list[Row]) -> list[dict[str, Any]]:
    """The rows without what the clock says."""
    clock = ("step_ms", "optimizer_ms", "throughput", "elapsed_s")
    return [{key: value for key, value in row.items() if key not in clock} for row in rows]


@pytest.mark.parametrize("data", ["colour", "gray"])
@pytest.mark.parametrize("name", [*OWN_CLASSIFIERS, "squeezenet1_1"])
def test_every_model_trains_on_colour_and_on_gray(name: str, data: str, make: Make, tmp_path: Path):
    sizes = {"model.d_model": 24, "model.n_layers": 2} if name == "vit_tiny" else {}
    config = make(
        data, sizes, model__name=name, data__resolution=32 if name == "squeezenet1_1" else None, training__steps=2
    )
    rows, weights = run(config, tmp_path / "run")
    losses = [row["loss"] for row in rows]
    assert len(set(losses)) == len(losses)
    channels = 1 if data == "gray" and name in OWN_CLASSIFIERS else 3
    kernels = {each.shape[1] for each in weights.values() if each.ndim == 4}
    assert channels in (kernels or {weights["layers.0.weight"].shape[1] / 16**2})


def test_a_perceptron_learns_shifted_images(make: Make, tmp_path: Path):
    config = make(
        "gray", training__steps=60, training__batch_size=20, evaluation__every=60, optimizer__lr=1e-2, data__pad=1
    )
    rows, _ = run(config, tmp_path / "run")
    assert [row["accuracy"] for row in rows if row["split"] == "val"][-1] > 0.9  # chance is 0.25
    assert read_lines(tmp_path / "run" / "metrics.jsonl") == rows


@pytest.mark.parametrize(
    ("data", "settings"),
    [
        ("colour", {"training.micro_batch_size": 2, "data.mixup": 0.2, "data.cutmix": 1.0}),
        ("gray", {"data.transform": "none"}),
        ("colour", EVERYTHING),
        ("photographs", {**EVERYTHING, "data.transform": "standard", "data.resolution": 16}),
        ("photographs", {"data.transform": "small", "data.resolution": 16}),
        ("colour", {"model.name": "resnet9", "model.channels_last": True}),
    ],
    ids=["decoded, mixed", "decoded", "decoded, everything", "encoded, everything", "encoded", "channels last"],
)
def test_a_stopped_run_goes_on_to_the_same_weights(data: str, settings: dict[str, Any], make: Make, tmp_path: Path):
    config = make(data, settings, optimizer__name="muon")
    rows, weights = run(config, tmp_path / "whole")

    class StopAtThree(SilentReporter):
        def trained(self, row: Any) -> None:
            if row["step"] == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(RunInterrupted, match="asgo train images --resume"):
        train(config, tmp_path / "parts", StopAtThree())
    resumed, other_weights = run(config, tmp_path / "parts", resume=True)
    assert figures(resumed) == figures(rows)
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


def test_mixed_micro_batches_give_the_gradient_of_the_whole_batch(make: Make, tmp_path: Path):
    mixed = {"data.mixup": 0.4, "data.cutmix": 1.0}
    with double_precision():
        found = [
            figures(run(make("colour", mixed, training__micro_batch_size=size), tmp_path / str(size))[0])
            for size in (8, 2, 1)
        ]
    for rows in found[1:]:
        assert [row["accuracy"] for row in rows] == [row["accuracy"] for row in found[0]]
        assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in found[0]], rel=bound(6))


def test_mixing_changes_the_training_loss_and_not_the_validation_loss(make: Make, tmp_path: Path):
    plain, _ = run(make(training__steps=1), tmp_path / "plain")
    mixed, _ = run(make(training__steps=1, data__mixup=1.0), tmp_path / "mixed")
    assert plain[0]["loss"] == mixed[0]["loss"]
    assert plain[1]["loss"] != mixed[1]["loss"]


@long
def test_two_processes_train_as_one_on_decoded_mixed_and_distorted_images(make: Make, tmp_path: Path):
    config = make("colour", EVERYTHING, training__micro_batch_size=2, training__steps=4, evaluation__every=4)
    with double_precision():
        alone, _ = run(config, tmp_path / "alone")
    carry_out([Job(config, tmp_path / "both", double=True)], 2, tmp_path)
    both = read_lines(tmp_path / "both" / "metrics.jsonl")
    assert [row["accuracy"] for row in alone] == [row["accuracy"] for row in both]
    assert [row["loss"] for row in alone] == pytest.approx([row["loss"] for row in both], rel=bound(4))


def test_layer_statistics_are_recorded(make: Make, tmp_path: Path):
    run(make(optimizer__name="asgo", statistics__every=3), tmp_path / "run")
    statistics = read_statistics(tmp_path / "run" / "statistics.jsonl")
    assert statistics is not None
    assert [record["step"] for record in statistics.records] == [3, 6]


def test_epochs_and_the_plan_of_a_decoded_data_set(make: Make, folders: Mapping[str, Path]):
    layer = Layer("test", {"data.folder": str(folders["gray"]), "training.epochs": 2, "training.batch_size": 8})
    assert resolve_run([preset_layer("images", "mnist-mlp"), layer]).training.steps == 15
    planned = plan(make("gray"))
    assert planned.parameters == 16 * 16 * 32 + 32 + 32 * 4 + 4
    assert [part.name for part in planned.parts] == ["head", "vectors", "matrices"]
    assert planned.epochs == 6 * 8 / 60


def test_a_checkpoint_knows_what_the_network_saw(make: Make, tmp_path: Path):
    run(make("gray", training__steps=1), tmp_path / "run")
    inputs = json.loads((tmp_path / "run/checkpoints/step-00000001/state.json").read_text())["data"]["inputs"]
    assert (inputs["transform"], inputs["resolution"], inputs["channels"]) == ("small", 16, 1)
    assert len(inputs["mean"]) == len(inputs["std"]) == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"data.mixup": -0.1}, r"data.mixup = -0.1: should be greater than or equal to 0"),
        ({"data.cutmix": -1.0}, r"data.cutmix = -1.0: should be greater"),
        ({"data.mean": [0.5]}, r"data: give mean and std, each with one value"),
        ({"data.mean": [0.5], "data.std": [0.0]}, r"data.std.* = 0.0: should be greater than 0"),
        ({"data.mean": [128.0], "data.std": [64.0]}, r"data.mean.* = 128.0: should be less than or equal to 1"),
        ({"data.transform": "smal"}, r"data.transform = 'smal'.*did you mean 'small'"),
        ({"model.patch_size": 4}, r"model: patch_size is a size of vit_tiny, not of mlp; leave it out"),
    ],
)
def test_settings_that_no_data_fits_are_refused(settings: dict[str, Any], words: str, make: Make):
    with pytest.raises(UsageError, match=words) as error:
        make("colour", settings)
    assert len(str(error.value).splitlines()) <= 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"data.transform": "none"}, r"data.transform=none: the images of .* vary in size; set data.resolution"),
        ({"data.transform": "small"}, r"data.transform=small: .* set data.resolution"),
        ({"data.mean": [0.5], "data.std": [0.5]}, r"have 1 values, but the images of .* have 3 channels: give 3"),
        ({"model.name": "resnet8"}, r"model.name: unknown classifier 'resnet8'; did you mean 'resnet"),
        ({"model.name": "vit_tiny", "model.patch_size": 5}, r"model.patch_size=5 does not divide the resolution, 224"),
        ({"model.name": "vit_tiny", "model.n_heads": 5}, r"model.n_heads=5 does not divide d_model=192"),
        ({"model.name": "resnet9", "data.resolution": 4}, r"resnet9 cannot take images of 4 .*data.resolution=32"),
        ({"data.transform": "small", "data.resolution": 4}, r"data.pad=4 is not below the resolution, 4 pixels"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_made(
    settings: dict[str, Any], words: str, make: Make, tmp_path: Path
):
    with pytest.raises(UsageError, match=words) as error:
        train(make("photographs", settings), tmp_path / "run", SilentReporter())
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_our_own_models_are_not_exported_to_torchvision_in_a_line_that_says_where_the_weights_are(
    make: Make, tmp_path: Path
):
    run(make(training__steps=1), tmp_path / "run")
    with pytest.raises(
        UsageError, match=r"torchvision does not have mlp; its weights are .*model.safetensors"
    ) as error:
        export_model(tmp_path / "run", "torchvision", tmp_path / "out")
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_an_export_of_a_decoded_data_set_says_what_its_images_went_through(make: Make, tmp_path: Path):
    run(make("gray", model__name="resnet18", training__steps=1), tmp_path / "run")
    export_model(tmp_path / "run", "torchvision", tmp_path / "out")
    description = json.loads((tmp_path / "out/description.json").read_text())
    assert (description["resize"], description["resolution"]) == (16, 16)
    assert len(description["mean"]) == len(description["std"]) == 3
    assert len({*description["mean"]}) == 1


class TestEarlierName:
    """Runs, sweeps and files that an earlier version of asgo wrote, in which the task is "imagenet"."""

    OLD_DATA = ("transform", "resolution", "reduced_decoding", "bad_images", "folder")
    OLD_MODEL = ("name", "channels_last")

    @pytest.fixture
    def config(self, make: Make) -> RunConfig:
        return make("photographs", model__name="squeezenet1_1", data__resolution=32, data__transform="paper")

    def old_values(self, config: RunConfig) -> dict[str, Any]:
        values = config.model_dump(mode="json")
        values["task"] = "imagenet"
        values["data"] = {key: values["data"][key] for key in self.OLD_DATA}
        values["model"] = {key: values["model"][key] for key in self.OLD_MODEL}
        return values

    @pytest.fixture
    def old_run(self, config: RunConfig, tmp_path: Path) -> Path:
        """A run of an earlier version, stopped after step 4 of 6."""
        folder = tmp_path / "old"
        run(config, folder)
        (folder / "checkpoints/step-00000006").rename(tmp_path / "last")
        old = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**old, "config": self.old_values(config)}))
        state_path = folder / "checkpoints/step-00000004/state.json"
        state = {**json.loads(state_path.read_text()), "config": self.old_values(config)}
        del state["data"]["inputs"], state["sha256"]
        digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
        state_path.write_text(json.dumps({**state, "sha256": digest}))
        return folder

    def test_its_configuration_is_the_present_one(self, config: RunConfig) -> None:
        assert load_run_config(self.old_values(config)) == config
        assert config.task == "images"

    def test_it_resumes_branches_and_is_exported_and_compared(
        self, old_run: Path, config: RunConfig, tmp_path: Path
    ) -> None:
        export_model(old_run, "torchvision", tmp_path / "out")
        assert json.loads((tmp_path / "out/description.json").read_text())["mean"] == [0.485, 0.456, 0.406]
        longer = config.model_copy(update={"training": config.training.model_copy(update={"steps": 8})})
        branch = BranchPoint.parse(f"{old_run}@4")
        assert train(longer, tmp_path / "branch", SilentReporter(), branch=branch)[-1]["step"] == 8
        rows, _ = run(config, old_run, resume=True)
        assert rows[-1]["step"] == 6
        runs, problems = read_runs({"old": old_run, "branch": tmp_path / "branch"})
        assert not problems
        assert {each.config.task for each in runs} == {"images"}


@pytest.mark.parametrize("data", ["colour", "photographs"])
def test_shadow_optimizers_change_nothing(data: str, make: Make, tmp_path: Path):
    """Neither weights and buffers of batch normalization, nor the accuracy of the steps, nor the mixed images."""
    settings = {**EVERYTHING, "data.resolution": 16, "model.name": "resnet9"}
    shadows = {"shadows.optimizers": ["muon", "torch.NAdam"], "shadows.every": 2}
    rows, weights = run(make(data, settings), tmp_path / "without")
    rows_with, weights_with = run(make(data, {**settings, **shadows}), tmp_path / "with")
    assert figures(rows_with) == figures(rows)
    assert weights_with.keys() == weights.keys()
    assert all(torch.equal(value, weights_with[name]) for name, value in weights.items())
    records = RunFolder(tmp_path / "with").shadows.read()
    assert records is not None
    assert [record["step"] for record in records.records] == [2, 4, 6]
    for record in records.records:
        assert all(math.isfinite(each["same_batch"]["own"]) for each in record["directions"].values())
