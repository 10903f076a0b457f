"""The moving average of the weights: validated, saved, and resumed exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from pipelines.config import RunConfig
from pipelines.errors import UsageError
from pipelines.tensors import model_tensors
from pipelines.training.average import WeightAverage
from pipelines.training.checkpoint import open_checkpoint
from pipelines.training.train import train
from tests.conftest import SilentReporter
from tests.pipelines.training.test_resume import Dies, assert_same_run, die_at

Make = Callable[..., RunConfig]
DECAY = 0.7


def tensors(run: Path, step: int, name: str) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(run / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors")


def test_the_saved_average_is_that_of_the_weights_after_every_step(
    small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    config = small_config(training__ema_decay=DECAY, checkpoint__every=1, checkpoint__keep=9)
    train(config, tmp_path / "run", reporter)
    for name, first in tensors(tmp_path / "run", 1, "average").items():
        average = first.double()
        for step in range(2, 7):
            weight = tensors(tmp_path / "run", step, "model")[name].double()
            average = DECAY * average + (1 - DECAY) * weight
        # Five times three roundings of 6e-8; what is near zero, of terms that cancel.
        torch.testing.assert_close(
            tensors(tmp_path / "run", 6, "average")[name].double(), average, rtol=1e-5, atol=1e-7
        )


def test_the_average_is_what_validates_and_it_leaves_training_as_it_was(
    small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    plain = train(small_config(), tmp_path / "plain", reporter)
    averaged = train(small_config(training__ema_decay=0.99), tmp_path / "averaged", reporter)
    losses = [[row["loss"] for row in rows if row["split"] == "train"] for rows in (plain, averaged)]
    assert losses[0] == losses[1]
    first, last = ([row["loss"] for row in averaged if row["split"] == "val"][at] for at in (0, -1))
    moved = [row["loss"] for row in plain if row["split"] == "val"][-1]
    assert abs(last - first) < 0.2 * abs(moved - first)  # it has hardly left its beginning
    assert not (tmp_path / "plain" / "checkpoints" / "step-00000006" / "average.safetensors").exists()


def test_a_run_with_an_average_resumes_exactly(
    small_config: Make, tmp_path: Path, reporter: SilentReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(training__ema_decay=DECAY)
    train(config, tmp_path / "whole", reporter)
    with monkeypatch.context() as patch:
        die_at(patch, step=3)
        with pytest.raises(Dies):
            train(config, tmp_path / "resumed", reporter)
    train(config, tmp_path / "resumed", reporter, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")
    for name, average in tensors(tmp_path / "whole", 6, "average").items():
        assert torch.equal(average, tensors(tmp_path / "resumed", 6, "average")[name]), name
    with pytest.raises(UsageError, match=r"training\.ema_decay is 0\.7 in the run"):
        train(small_config(), tmp_path / "resumed", reporter, resume=True)


def test_counters_are_copied_and_statistics_averaged() -> None:
    """Batch normalization has both; `num_batches_tracked` is an integer."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    average = WeightAverage(model, DECAY)
    for _ in range(3):
        model(torch.randn(4, 1, 3, 3))
        average.update()
    assert average.tensors["1.num_batches_tracked"] == 3
    assert not torch.equal(average.tensors["1.running_mean"], model[1].running_mean)
    weights = {name: tensor.clone() for name, tensor in model_tensors(model).items()}
    with average.in_place_of_weights():
        assert not torch.equal(model[1].running_mean, weights["1.running_mean"])
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model_tensors(model).items())


def test_a_checkpoint_hands_out_what_was_validated(
    small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    """To generate text, and to export."""
    train(small_config(training__ema_decay=DECAY), tmp_path / "run", reporter)
    checkpoint = open_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000006")
    handed_out, averages = checkpoint.model_tensors(), tensors(tmp_path / "run", 6, "average")
    assert all(torch.equal(handed_out[name], average) for name, average in averages.items())
