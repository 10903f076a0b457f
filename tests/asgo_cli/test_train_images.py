"""`asgo train images`, from a data folder to a comparison, and `asgo train imagenet`, the same task."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from asgo_cli.app import app
from pipelines.optimizers import OPTIMIZER_NAMES
from tests.pipelines.data.images.decoded_folders import stripes, write_decoded

SMALL = ("model.widths=[32]", "training.steps=40", "training.batch_size=20", "evaluation.every=20", "data.pad=1")
SET = [word for setting in SMALL for word in ("--set", setting)]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory but for images in data/mine."""
    splits = {"train": stripes(60, channels=1), "val": stripes(20, channels=1, seed=1)}
    write_decoded(tmp_path / "data" / "mine", splits)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def asgo(*words: str) -> Result:
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, f"{result.output}{result.exception!r}"
    return result


def test_two_optimizers_are_trained_and_compared(world: Path) -> None:
    for optimizer, lr in (("asgo", "0.01"), ("adamw", "0.01")):
        words = ("--data", "data/mine", "--model", "mlp", "--optimizer", optimizer, "--lr", lr, "--device", "cpu")
        asgo("train", "images", *words, *SET)
    assert sorted(path.name for path in (world / "runs").iterdir()) == ["images-adamw-s42", "images-asgo-s42"]
    compared = json.loads(asgo("compare", "runs", "--json").stdout)
    assert compared["task"] == "images"
    assert len(compared["contenders"]) == 2
    again = asgo("train", "imagenet", "--resume", "--out", "runs/images-asgo-s42")
    assert "images-asgo-s42" in again.output


def test_a_dry_run_writes_nothing(world: Path) -> None:
    shown = asgo("train", "images", "--data", "data/mine", "--model", "resnet20", "--dry-run").output
    assert "resnet20, 269,044 parameters" in " ".join(shown.split())
    assert "head" in shown
    assert not (world / "runs").exists()


def test_what_is_printed_is_a_configuration(world: Path) -> None:
    printed = asgo("train", "images", "--preset", "mnist-mlp", "--optimizer", "muon", "--print-config").stdout
    settings = tomllib.loads(printed)
    assert (settings["task"], settings["model"]["name"], settings["data"]["transform"]) == ("images", "mlp", "none")
    (world / "old.toml").write_text(printed.replace('task = "images"', 'task = "imagenet"'))
    assert asgo("train", "imagenet", "--config", "old.toml", "--print-config").stdout == printed


def test_each_command_has_its_own_default() -> None:
    presets = {
        command: tomllib.loads(asgo("train", command, "--print-config").stdout) for command in ("images", "imagenet")
    }
    assert {name: (each["preset"], each["data"]["folder"]) for name, each in presets.items()} == {
        "images": ("images", "data/images"),
        "imagenet": ("asro-imagenet", "data/imagenet"),
    }


@pytest.mark.parametrize("preset", ["images", "cifar10-resnet", "mnist-mlp", "imagenette-resnet18"])
def test_a_preset_has_settings_for_every_optimizer(preset: str) -> None:
    for optimizer in OPTIMIZER_NAMES:
        printed = asgo("train", "images", "--preset", preset, "--optimizer", optimizer, "--print-config").stdout
        assert tomllib.loads(printed)["optimizer"]["lr"] > 0


def test_help_names_models_and_presets() -> None:
    shown = " ".join(asgo("train", "images", "--help").output.replace("│", " ").split())
    for words in ("resnet9", "vit_tiny", "mnist-mlp", "asgo data images", "--workers"):
        assert words in shown
    assert "asro-imagenet" in asgo("train", "imagenet", "--help").output


def test_a_sweep_may_have_the_earlier_name(world: Path) -> None:
    for task in ("images", "imagenet"):
        (world / "plan.toml").write_text(
            f'task = "{task}"\npreset = "mnist-mlp"\n[data]\nfolder = "data/mine"\n'
            '[grid]\noptimizer.name = ["asgo", "adamw"]\n'
        )
        assert "asgo-s42" in asgo("sweep", "plan.toml", "--dry-run").output
