"""Time of training steps and of their optimizer, without evaluation and saving."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from pipelines.training.device import synchronize


@dataclass
class Lap:
    """Means over the steps since the last lap, in milliseconds."""

    step_ms: float
    optimizer_ms: float


@dataclass
class StepClock:
    """A stopwatch for steps. It synchronizes with a GPU only when a lap ends or training pauses."""

    device: torch.device
    elapsed_s: float = 0.0
    """Seconds in training steps since the run began, over all resumes."""
    _started: float | None = None
    _lap_start_s: float = 0.0
    _steps: int = 0
    _optimizer_s: float = 0.0
    _events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def restart_at(self, elapsed_s: float) -> None:
        """Continue from the `elapsed_s` of a checkpoint."""
        self.elapsed_s = self._lap_start_s = elapsed_s

    def run(self) -> None:
        """Start, or continue after a pause."""
        if self._started is None:
            self._started = time.perf_counter()

    def pause(self) -> None:
        """Stop until `run` is called."""
        if self._started is not None:
            synchronize(self.device)
            self.elapsed_s += time.perf_counter() - self._started
            self._started = None

    @contextlib.contextmanager
    def optimizer(self) -> Iterator[None]:
        """Context manager around the optimizer's step, once per step."""
        self._steps += 1
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            begin_s = time.perf_counter()
            yield
            synchronize(self.device)
            self._optimizer_s += time.perf_counter() - begin_s

    def lap(self) -> Lap:
        """End the lap and return the means since the last one."""
        self.pause()
        self.run()
        milliseconds = sum(begin.elapsed_time(end) for begin, end in self._events)
        seconds = self.elapsed_s - self._lap_start_s
        lap = Lap(
            step_ms=1e3 * seconds / self._steps,
            optimizer_ms=(1e3 * self._optimizer_s + milliseconds) / self._steps,
        )
        self._lap_start_s, self._steps, self._optimizer_s, self._events = self.elapsed_s, 0, 0.0, []
        return lap
