"""What stops a run: losses that are not finite, and disks that refuse."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipelines.config import RunConfig
from pipelines.errors import AsgoError, Diverged, UsageError
from pipelines.training.checkpoint import newest_checkpoint
from pipelines.training.gpt_task import GPTTask
from pipelines.training.run_folder import RunFolder
from pipelines.training.train import train
from tests.conftest import SMALL, SilentReporter
from tests.long import long

Make = Callable[..., RunConfig]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(
    bad: float, small_config: Make, tmp_path: Path, reporter: SilentReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Tensor] = {}
    whole = GPTTask.loss

    def failing(self: GPTTask, batch: tuple[Tensor, ...]) -> Tensor:
        loss = whole(self, batch)
        if self.model.training and len(seen) == 0 and failing.calls == 3:  # type: ignore[attr-defined]
            seen.update({name: param.detach().clone() for name, param in self.model.named_parameters()})
            seen["model"] = self.model  # type: ignore[assignment]
            loss = loss * bad
        failing.calls += self.model.training  # type: ignore[attr-defined]
        return loss

    failing.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(GPTTask, "loss", failing)
    with pytest.raises(AsgoError) as error:
        train(small_config(optimizer__name="adamw"), tmp_path / "run", reporter)
    message = str(error.value)
    assert message.startswith(f"step 4: the loss is {bad}")
    assert "at learning rate 0.00" in message
    assert "token_embedding.weight" in message
    assert "step-00000002" in message
    model: torch.nn.Module = seen.pop("model")  # type: ignore[assignment]
    assert all(torch.equal(param, seen[name]) for name, param in model.named_parameters())
    checkpoint, skipped = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None
    assert (checkpoint.step, skipped) == (2, [])


def test_overflowing_gradients_under_a_loss_scale_are_skipped_not_fatal(
    small_config: Make, tmp_path: Path, reporter: SilentReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float16: the scaler leaves the weights alone for that step and lowers its scale."""
    whole = GPTTask.loss
    scales: list[float] = []

    def overflowing(self: GPTTask, batch: tuple[Tensor, ...]) -> Tensor:
        loss = whole(self, batch)
        if self.model.training:
            scales.append(0)
            if len(scales) == 2:
                loss.register_hook(lambda grad: grad * float("inf"))
        return loss

    monkeypatch.setattr(GPTTask, "loss", overflowing)
    rows = train(small_config(training__precision="fp16"), tmp_path / "run", reporter)
    skipped = next(row for row in rows if row["step"] == 2 and row["split"] == "train")
    assert "grad_norm" not in skipped
    checkpoint, _ = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.state["loss_scale"]["scale"] == 32768.0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB."""
    yield from _mounted(tmp_path / "disk", "size=400k")


def _mounted(place: Path, options: str) -> Iterator[Path]:
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"mounting a tmpfs is not permitted here: {mounted.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_keeps_the_last_good_checkpoint(
    small_disk: Path, small_config: Make, reporter: SilentReporter
) -> None:
    config = small_config(checkpoint__keep=100, checkpoint__every=1, training__steps=40)
    with pytest.raises(
        AsgoError, match=r"could not be saved: .*No space left.*the last valid checkpoint is|metrics.jsonl: No space"
    ):
        train(config, small_disk / "run", reporter)
    checkpoints = small_disk / "run" / "checkpoints"
    assert not list(checkpoints.glob(".*")), "nothing half-written is left"
    checkpoint, skipped = newest_checkpoint(checkpoints)
    assert checkpoint is not None
    assert checkpoint.step >= 1
    assert skipped == []
    subprocess.run(["mount", "-o", "remount,size=40M", str(small_disk)], check=True)
    assert train(config, small_disk / "run", reporter, resume=True)[-1]["step"] == 40


@long
def test_a_full_disk_ends_two_processes_with_one_line_and_they_go_on_when_there_is_room(
    small_disk: Path, token_folder: Path
) -> None:
    settings = {**SMALL, "checkpoint.every": 1, "checkpoint.keep": 100, "training.steps": 40}
    command = [
        sys.executable, "-m", "asgo_cli", "train", "gpt", "--preset=tiny", f"--data={token_folder}", "--processes=2",
        f"--out={small_disk / 'run'}", "--resume", *(f"--set={key}={value}" for key, value in settings.items()),
    ]  # fmt: skip
    full = subprocess.run(command, capture_output=True, text=True)
    assert full.returncode == 1
    (line,) = [line for line in full.stderr.splitlines() if line.startswith("error: ")]
    assert "process 0 of 2" in line
    assert "No space left" in line
    subprocess.run(["mount", "-o", "remount,size=40M", str(small_disk)], check=True)
    resumed = subprocess.run(command, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from" in resumed.stderr


def test_a_read_only_disk_is_named(small_disk: Path, small_config: Make, reporter: SilentReporter) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OSError, match="Read-only file system"):
        train(small_config(), small_disk / "run", reporter)
    assert list(small_disk.iterdir()) == []


def test_a_checkpoint_that_fails_meanwhile_does_not_hide_that_the_run_diverged(
    small_config: Make, tmp_path: Path, reporter: SilentReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    diverged = threading.Event()
    loss = GPTTask.loss
    calls: list[bool] = []

    def refused(*_: object) -> None:
        assert diverged.wait(30)
        raise AsgoError("the disk is full")

    def failing(task: GPTTask, batch: tuple[Tensor, ...]) -> Tensor:
        calls.append(task.model.training)
        if sum(calls) == 3:
            diverged.set()
        return loss(task, batch) * (float("nan") if sum(calls) == 3 else 1)

    monkeypatch.setattr("pipelines.training.checkpoint_writer.write_snapshot", refused)
    monkeypatch.setattr(GPTTask, "loss", failing)
    with pytest.raises(Diverged, match="step 3: the loss is nan"):
        train(small_config(), tmp_path / "run", reporter)
    assert RunFolder(tmp_path / "run").divergence() is not None


def test_a_device_that_is_not_there_is_refused(small_config: Make, tmp_path: Path, reporter: SilentReporter) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(UsageError, match="--device cuda: not on this machine, which has cpu"):
        train(small_config(runtime__device="cuda"), tmp_path / "run", reporter)
    assert not (tmp_path / "run").exists()


def test_a_validation_loss_that_is_not_finite_is_not_recorded(
    small_config: Make, tmp_path: Path, reporter: SilentReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GPTTask, "evaluate", lambda *_: {"loss": float("nan")})
    with pytest.raises(AsgoError, match="step 0: the validation loss is nan; there is no checkpoint yet"):
        train(small_config(), tmp_path / "run", reporter)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""
