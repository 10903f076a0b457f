"""Time of training steps and of their optimizer, without evaluation and saving."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from pipelines.training.device import synchronize

Stamp = float | torch.cuda.Event
"""A point in time: seconds on the host's clock, or when the work queued on a GPU so far ends."""
Interval = tuple[Stamp, Stamp]


@dataclass
class Lap:
    """Means over the steps since the last lap, in milliseconds, and the clock's `elapsed_s` at the end."""

    step_ms: float
    optimizer_ms: float
    elapsed_s: float = 0.0


@dataclass(frozen=True)
class FinishedLap:
    """The times of a lap, for `StepClock.read`."""

    steps: int
    running: list[Interval]
    optimizer: list[Interval]


@dataclass
class StepClock:
    """A stopwatch for steps. It waits for a GPU only when training pauses, not when a lap ends."""

    device: torch.device
    _before_s: float = 0.0
    _started: Stamp | None = None
    _steps: int = 0
    _running: list[Interval] = field(default_factory=list)
    _optimizer: list[Interval] = field(default_factory=list)

    @property
    def elapsed_s(self) -> float:
        """Seconds in training steps since the run began, over all resumes, without laps that were not read."""
        return self._before_s + seconds_in(self._running)

    def restart_at(self, elapsed_s: float) -> None:
        """Continue from the `elapsed_s` of a checkpoint."""
        self._before_s = elapsed_s

    def run(self) -> None:
        """Start, or continue after a pause."""
        if self._started is None:
            self._started = self.stamp()

    def pause(self) -> None:
        """Stop until `run` is called."""
        if self._started is not None:
            self._running.append((self._started, self.stamp()))
            self._started = None
            synchronize(self.device)

    @contextlib.contextmanager
    def excluded(self) -> Iterator[None]:
        """Context manager around work that does not count as training. Does not wait for a GPU, as `pause` does."""
        if self._started is not None:
            self._running.append((self._started, self.stamp()))
        yield
        self._started = self.stamp()

    @contextlib.contextmanager
    def optimizer(self) -> Iterator[None]:
        """Context manager around the optimizer's step, once per step."""
        self._steps += 1
        begin = self.stamp()
        yield
        self._optimizer.append((begin, self.stamp()))

    def end_lap(self) -> FinishedLap:
        """End the lap, without waiting for a GPU."""
        if self._started is not None:
            now = self.stamp()
            self._running.append((self._started, now))
            self._started = now
        lap = FinishedLap(self._steps, self._running, self._optimizer)
        self._steps, self._running, self._optimizer = 0, [], []
        return lap

    def read(self, lap: FinishedLap) -> Lap:
        """Return the means of a lap, and add its time. A GPU must have done the work that was queued before its end."""
        seconds = seconds_in(lap.running)
        self._before_s += seconds
        return Lap(1e3 * seconds / lap.steps, 1e3 * seconds_in(lap.optimizer) / lap.steps, self._before_s)

    def lap(self) -> Lap:
        """End the lap, wait for the device, and return the means since the last one."""
        lap = self.end_lap()
        synchronize(self.device)
        return self.read(lap)

    def stamp(self) -> Stamp:
        """Return the present point in time. Does not wait for a GPU, but for other devices."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            return event
        synchronize(self.device)
        return time.perf_counter()


def seconds_in(intervals: list[Interval]) -> float:
    """Return the total length of intervals. A GPU must have done the work that was queued before their ends."""
    total = 0.0
    for begin, end in intervals:
        if isinstance(begin, float) and isinstance(end, float):
            total += end - begin
        elif not isinstance(begin, float) and not isinstance(end, float):
            total += begin.elapsed_time(end) / 1e3
    return total
