"""Image classification through the same loop: on real pictures, in archives and out of them."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from pipelines.config import ImageRunConfig, RunConfig
from pipelines.data.imagenet.importer import prepare_imagenet
from pipelines.errors import AsgoError, RunInterrupted, UsageError
from pipelines.resolve import Layer, preset_layer, preset_names, resolve
from pipelines.steps import resolve_run
from pipelines.training.checkpoint import newest_checkpoint
from pipelines.training.metrics import Row, read_lines
from pipelines.training.train import train
from tests.conftest import SilentReporter
from tests.long import long
from tests.pipelines.data.imagenet.archive_makers import pictures, write_archives
from tests.pipelines.training.double_precision import bound, double_precision
from tests.pipelines.training.processes import Job, carry_out

pytestmark = pytest.mark.usefixtures("forked_children")  # data/images/test_loader.py starts them as a run does

SMALL: dict[str, Any] = {
    "model.name": "squeezenet1_1",
    "data.resolution": 32,
    "training.steps": 6,
    "training.batch_size": 8,
    "evaluation.every": 3,
    "checkpoint.every": 2,
    "runtime.device": "cpu",
    "runtime.workers": 1,
}

Make = Callable[..., RunConfig]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Four classes of photographs, 24 to train and 8 to validate each, extracted and in their archives."""
    root = tmp_path_factory.mktemp("imagenet")
    archives = write_archives(root / "archives", pictures(4, 24, 8, (64, 48)), kit="map_clsloc.txt")
    for name in ("extracted", "archives"):
        prepare_imagenet(archives, root / f"{name}-data", extract=name == "extracted", report=lambda *_: None)
    return {name: root / f"{name}-data" for name in ("extracted", "archives")}


@pytest.fixture
def make(folders: Mapping[str, Path]) -> Make:
    """The configuration of a small run; keywords are dotted keys with `__` for the dot."""

    def build(layout: str = "archives", optimizer: str = "adam", **changes: Any) -> RunConfig:
        values = {key.replace("__", "."): value for key, value in changes.items()}
        flags = {**SMALL, "data.folder": str(folders[layout]), "optimizer.name": optimizer, **values}
        return resolve([preset_layer("images", "asro-imagenet"), Layer("test", flags)])

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


def test_accuracy_rises_far_above_chance_and_is_recorded_for_both_splits(make: Make, tmp_path: Path):
    config = make(model__name="resnet18", training__steps=30, training__batch_size=16, evaluation__every=30)
    rows, _ = run(config, tmp_path / "run")
    last = [row for row in rows if row["split"] == "val"][-1]
    assert last["accuracy"] >= 0.75  # chance is 0.25
    assert last["top5_accuracy"] == 1.0  # there are four classes
    assert rows[0]["split"] == "val"
    assert 0.1 <= rows[0]["accuracy"] <= 0.5
    assert [row["accuracy"] for row in rows if row["split"] == "train"][-1] > 0.9
    assert rows[-1]["epoch"] == 30 * 16 / 96
    assert read_lines(tmp_path / "run" / "metrics.jsonl") == rows


@pytest.mark.parametrize(("epochs", "steps"), [(1, 12), (0.5, 6), (1.1, 14), (0.001, 1), (90, 1080)])
def test_epochs_are_rounded_up_to_steps(epochs: float, steps: int, folders: Mapping[str, Path]) -> None:
    """Of 96 images in batches of 8."""
    values = {"training.epochs": epochs, "training.batch_size": 8, "data.folder": str(folders["archives"])}
    config = resolve_run([preset_layer("images", "asro-imagenet"), Layer("test", values)])
    assert config.training.steps == steps
    assert "epochs" not in config.model_dump()["training"]


@long
def test_archives_and_extracted_files_give_the_same_training(make: Make, tmp_path: Path):
    (rows, weights), (others, other_weights) = (
        run(make(layout), tmp_path / layout) for layout in ("archives", "extracted")
    )
    assert figures(rows) == figures(others)
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


@pytest.mark.parametrize("transform", ["paper", "standard"])
def test_a_stopped_run_goes_on_in_the_middle_of_an_epoch_to_the_same_weights(
    transform: str, make: Make, tmp_path: Path
):
    config = make(data__transform=transform, training__micro_batch_size=4)
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


@pytest.mark.parametrize("optimizer", ["asgo", "dasgo", "muon", "shampoo", "accasro", "sgd-nesterov"])
def test_every_kind_of_optimizer_trains_convolutions(optimizer: str, make: Make, tmp_path: Path):
    rows, _ = run(make(optimizer=optimizer, training__steps=3), tmp_path / "run")
    losses = [row["loss"] for row in rows]
    assert len(set(losses)) == len(losses)


def test_a_bad_image_stops_the_run_by_its_name_or_is_counted_when_the_user_says_so(
    make: Make, folders: Mapping[str, Path], tmp_path: Path
):
    shutil.copytree(folders["extracted"], tmp_path / "data")
    for part in ("train", "val"):
        bad = sorted((tmp_path / "data" / part / "n01440764").iterdir())[0]
        bad.write_bytes(b"x" * bad.stat().st_size)
    config = make(data__folder=str(tmp_path / "data"), training__steps=12)
    with pytest.raises(AsgoError, match=r"ILSVRC2012_val_0+1\.JPEG"):
        train(config, tmp_path / "stops", SilentReporter())
    reporter = SilentReporter()
    skips = make(data__folder=str(tmp_path / "data"), training__steps=12, data__bad_images="skip")
    train(skips, tmp_path / "skips", reporter)
    training, validation = reporter.notes
    assert training.startswith("training images skipped: 1; the first: n01440764/n01440764_1007.JPEG:")
    assert "skipped: 1; the first: n01440764/ILSVRC2012_val_00000001.JPEG: " in validation


@long
def test_label_smoothing_changes_the_training_loss_and_not_the_validation_loss(make: Make, tmp_path: Path):
    plain, _ = run(make(training__steps=1), tmp_path / "plain")
    smoothed, _ = run(make(training__steps=1, training__label_smoothing=0.1), tmp_path / "smoothed")
    assert plain[0]["loss"] == smoothed[0]["loss"]
    assert plain[1]["loss"] != smoothed[1]["loss"]


@long
def test_channels_last_changes_nothing_but_rounding(make: Make, tmp_path: Path):
    with double_precision():
        plain, _ = run(make(training__steps=2), tmp_path / "plain")
        other, _ = run(make(training__steps=2, model__channels_last=True), tmp_path / "other")
    assert [row["loss"] for row in other] == pytest.approx([row["loss"] for row in plain], rel=bound(2))


def test_a_classifier_that_there_is_not_is_refused_with_the_nearest(make: Make, tmp_path: Path):
    with pytest.raises(UsageError, match=r"model.name: unknown classifier 'resnet81'; did you mean 'resnet18'"):
        train(make(model__name="resnet81"), tmp_path / "run", SilentReporter())
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_knows_the_classes(make: Make, tmp_path: Path):
    run(make(training__steps=1), tmp_path / "run")
    state = json.loads((tmp_path / "run/checkpoints/step-00000001/state.json").read_text())
    assert len(state["data"]["classes"]) == 4
    assert ["n01440764", "tench"] in state["data"]["classes"]


def test_the_paper_s_settings_are_the_preset_s():
    config = resolve([preset_layer("images", "asro-imagenet")])
    assert isinstance(config, ImageRunConfig)
    assert "asro-imagenet" in preset_names("images")
    assert (config.model.name, config.data.resolution, config.data.transform) == ("efficientnet_b1", 208, "paper")
    assert (config.training.batch_size, config.training.steps) == (256, 61 * 5_005)
    accasro = config.optimizer.model_dump()
    assert accasro["lr"] * accasro["max_scale"] == pytest.approx(1e-3)
    assert accasro["lr"] * accasro["min_scale"] == pytest.approx(1e-5)
    assert (accasro["increment"], accasro["decrement"], accasro["weight_decay"]) == (2e-2, 7.5e-5, 0.0)
    assert config.schedule.kind == "constant"


def test_every_classifier_of_torchvision_has_as_many_outputs_as_there_are_classes():
    from models.vision import build_classifier

    for name in ("efficientnet_b1", "googlenet", "inception_v3", "vit_b_16"):
        with torch.device("meta"):
            model = build_classifier(name, 7)
        outputs = [module.out_features for module in model.modules() if isinstance(module, nn.Linear)]
        assert outputs[-1] == 7


@long
def test_two_processes_normalize_batches_and_train_as_one(make: Make, tmp_path: Path):
    """In float64: rounding alone moves the losses of a float32 run of a small batch-normalized model by 1e-3.

    Batch normalization sees the images of both; the last round of the validation has one for the first alone.
    """
    config = make(model__name="shufflenet_v2_x0_5", optimizer="asgo", training__steps=4, evaluation__every=4)
    uneven = make(
        model__name="shufflenet_v2_x0_5",
        evaluation__batches=1,
        training__batch_size=10,
        training__steps=1,
        evaluation__every=1,
    )
    with double_precision():
        alone, _ = run(config, tmp_path / "alone")
        few, _ = run(uneven, tmp_path / "few-alone")
    carry_out(
        [Job(config, tmp_path / "both", double=True), Job(uneven, tmp_path / "few-both", double=True)], 2, tmp_path
    )
    both, few_both = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("both", "few-both"))
    for rows, others in ((alone, both), (few, few_both)):
        assert [row["accuracy"] for row in rows] == [row["accuracy"] for row in others]
        assert [row["top5_accuracy"] for row in rows] == [row["top5_accuracy"] for row in others]
        assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in others], rel=bound(4))
    weights, others = (
        safetensors.torch.load_file(tmp_path / name / "checkpoints/step-00000004/model.safetensors")
        for name in ("alone", "both")
    )
    torch.testing.assert_close(others["conv1.1.running_var"], weights["conv1.1.running_var"], rtol=bound(4), atol=0)
    assert others["conv1.1.num_batches_tracked"] == weights["conv1.1.num_batches_tracked"] == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model__name": "vit_b_16", "data__resolution": 208},
            r"vit_b_16 cannot take images of 208 .*=224",
        ),
        ({"model__name": "alexnet", "data__resolution": 16}, r"alexnet cannot take images of 16 pixels"),
        (
            {"model__name": "resnet18", "training__batch_size": 1},
            r"resnet18 cannot train on batches of 1 .*training.batch_size",
        ),
    ],
)
def test_what_a_classifier_refuses_is_told_before_anything_is_made(
    make: Make, tmp_path: Path, changes: dict[str, Any], words: str
):
    with pytest.raises(UsageError, match=words):
        train(make(**changes), tmp_path / "run", SilentReporter())
    assert not (tmp_path / "run").exists()


def test_a_classifier_has_no_heads(make: Make):
    with pytest.raises(UsageError, match="by_heads"):
        make(optimizer="muon", optimizer__by_heads=True)


def test_bad_images_may_be_skipped_from_a_resume_on(make: Make, tmp_path: Path):
    train(make(training__steps=2, checkpoint__every=1), tmp_path / "run", SilentReporter())
    rows, _ = run(make(training__steps=2, data__bad_images="skip"), tmp_path / "run", resume=True)
    assert rows[-1]["step"] == 2


def test_no_validation_image_that_can_be_decoded_is_one_line(tmp_path: Path):
    content = pictures(2, 8, 2, (64, 48))
    broken = dataclasses.replace(content, validation=[(wnid, b"no image") for wnid, _ in content.validation])
    archives = write_archives(tmp_path / "archives", broken, kit="map_clsloc.txt")
    prepare_imagenet(archives, tmp_path / "data", extract=False, report=lambda *_: None)
    flags = {**SMALL, "data.folder": str(tmp_path / "data"), "optimizer.name": "adam", "data.bad_images": "skip"}
    config = resolve([preset_layer("images", "asro-imagenet"), Layer("test", flags)])
    with pytest.raises(AsgoError, match="no validation image can be decoded"):
        train(config, tmp_path / "run", SilentReporter())
