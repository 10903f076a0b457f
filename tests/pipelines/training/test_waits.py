"""How often the host waits for a GPU: once a step, for the loss and the norm that decide whether the weights change.

On fake CUDA tensors, which need no GPU, with events that are complete only after a wait.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from optim import build_optimizer
from pipelines.config import RunConfig
from pipelines.errors import Diverged
from pipelines.stopping import StopRequest
from pipelines.training import loop
from pipelines.training.checkpoint_writer import CheckpointWriter
from pipelines.training.clock import StepClock
from pipelines.training.metrics import Row
from pipelines.training.run import Run
from pipelines.training.run_folder import RunFolder
from pipelines.training.schedule import Scheduler
from pipelines.training.state import TrainState
from tests.conftest import SilentReporter
from tests.optim.test_launches import Log

Make = Callable[..., RunConfig]


class Device:
    """A GPU of which the host knows what it waited for: each event takes a millisecond after the one before."""

    def __init__(self) -> None:
        self.waits: list[str] = []
        self.recorded = self.done = 0
        self.losses: list[float] = []

    def wait(self, reason: str) -> None:
        self.waits.append(reason)
        self.done = self.recorded


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    gpu = Device()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            gpu.recorded += 1
            self.number = gpu.recorded

        def elapsed_time(self, other: Event) -> float:
            assert max(self.number, other.number) <= gpu.done, "the host would have to wait for this event"
            return float(other.number - self.number)

    def read(tensor: Tensor) -> list[float]:
        assert tensor.device.type == "cuda"
        gpu.wait("loss and norm")
        return [1.0, gpu.losses.pop(0) if gpu.losses else 1.0]

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: gpu.wait("synchronize"))
    monkeypatch.setattr(FakeTensor, "tolist", read)
    monkeypatch.setattr(loop, "take_snapshot", lambda *_: None)
    monkeypatch.setattr(loop, "try_out", lambda run: None)
    with FakeTensorMode():
        yield gpu


class FakeTask:
    """A linear model on a GPU. The backward pass of fake CUDA tensors needs a GPU, so this one is made up."""

    tokens_per_sample = 16

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model = self.network = nn.Linear(64, 64, device="cuda")
        monkeypatch.setattr(torch.autograd, "backward", self._backward)

    def _backward(self, loss: Tensor) -> None:
        for param in self.model.parameters():
            param.grad = torch.empty_like(param)

    def micro_batches(self, step: int) -> Iterator[tuple[Tensor, ...]]:
        for _ in range(2):
            yield (torch.empty(2, 64, device="cuda"),)

    def loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        return self.network(batch[0]).square().mean()  # type: ignore[no-any-return]

    def training_counts(self) -> Tensor:
        return torch.empty(0, device="cuda")

    def training_metrics(self, counts: Sequence[float]) -> dict[str, float]:
        return {}

    def evaluate(self, should_stop: object) -> dict[str, float]:
        return {"loss": 1.0}

    def epoch_at(self, step: int) -> float:
        return 0.0

    def description(self) -> dict[str, Any]:
        return {}


class Recorder(SilentReporter):
    """Keeps the rows, and how many waits there were when it got each."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.rows: list[tuple[str, int, int]] = []
        self._device = device

    def trained(self, row: Row) -> None:  # type: ignore[override]
        self.rows.append(("train", row["step"], len(self._device.waits)))

    def validated(self, row: Row) -> None:  # type: ignore[override]
        self.rows.append(("val", row["step"], len(self._device.waits)))


def start(config: RunConfig, device: Device, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Run, Recorder]:
    task, reporter = FakeTask(monkeypatch), Recorder(device)
    monkeypatch.setattr(RunFolder, "append", lambda *_: None)
    optimizer = build_optimizer(task.model, "adamw", config.training.steps, lr=1e-3)
    scheduler = Scheduler(config.schedule, config.training.steps, optimizer)
    gpu = torch.device("cuda")
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = TrainState(task.model, optimizer, scheduler, scaler, StepClock(gpu))
    run_folder = RunFolder(folder)
    writer = CheckpointWriter(run_folder, 1)
    monkeypatch.setattr(writer, "check", lambda: None)
    return Run(task, config, run_folder, state, reporter, StopRequest(), writer), reporter  # type: ignore[arg-type]


def test_the_host_waits_once_a_step_and_metrics_come_a_step_late(
    device: Device, small_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(training__steps=5, evaluation__every=3, checkpoint__every=3, optimizer__name="adamw")
    run, reporter = start(config, device, tmp_path, monkeypatch)
    with Log() as log:
        loop.fit(run)
    assert log.waits == []
    a_step, pause = ["loss and norm"], ["synchronize"]
    assert device.waits == [*3 * a_step, *pause, *2 * a_step, *pause]
    # (1, 2): the row of step 1 comes after the second wait. Before a validation, there are no late rows.
    assert reporter.rows == [
        ("val", 0, 0), ("train", 1, 2), ("train", 2, 3), ("train", 3, 4), ("val", 3, 4),
        ("train", 4, 6), ("train", 5, 7), ("val", 5, 7),
    ]  # fmt: skip
    trained = [row for row in run.state.rows if row["split"] == "train"]
    # A step records two events of the optimizer and one at its end. The fourth has that of the pause before it, too.
    assert [row["step_ms"] for row in trained] == [3.0, 3.0, 3.0, 4.0, 3.0]
    assert [row["optimizer_ms"] for row in trained] == [1.0] * 5
    assert [row["elapsed_s"] for row in trained] == pytest.approx([0.003, 0.006, 0.009, 0.013, 0.016])
    assert run.state.clock.elapsed_s == pytest.approx(0.017)


def test_a_loss_that_is_not_finite_stops_before_the_step_and_the_row_before_is_recorded(
    device: Device, small_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(training__steps=5, evaluation__every=5, optimizer__name="adamw")
    run, reporter = start(config, device, tmp_path, monkeypatch)
    device.losses = [1.0, 1.0, math.nan]
    stepped: list[int] = []
    monkeypatch.setattr(run.state.optimizer, "step", lambda: stepped.append(run.state.step))
    monkeypatch.setattr(loop, "_refuse_not_finite", refuse)
    with pytest.raises(Diverged):
        loop.fit(run)
    assert stepped == [0, 1]
    assert [row[:2] for row in reporter.rows] == [("val", 0), ("train", 1), ("train", 2)]


def refuse(run: Run, loss: float, norm: float) -> None:
    """As the real one, which reads what fake tensors do not have."""
    if not math.isfinite(loss):
        raise Diverged(run.state.step + 1, "the loss is not finite")
