"""How those who train take turns, and what is measured of them."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from pipelines.benchmarks.compiling import compiled_graphs
from pipelines.benchmarks.optimizers import BenchReporter
from pipelines.benchmarks.state_size import state_bytes
from pipelines.benchmarks.trainers import Trainer
from pipelines.benchmarks.training_report import TrainingMeasurement
from pipelines.benchmarks.training_workload import largest_divisor
from pipelines.config import GPTRunConfig
from pipelines.errors import AsgoError
from pipelines.training.clock import Lap


@dataclass(frozen=True)
class Candidate:
    """One way to train: its name, where its optimizer is from, and how it is built from a configuration."""

    name: str
    library: str
    optimizer: str
    config: GPTRunConfig
    build: Callable[[GPTRunConfig], Trainer]


def measure(
    candidates: Sequence[Candidate],
    device: torch.device,
    *,
    shrinks_micro_batches: bool,
    repeats: int,
    budget_s: float,
    reporter: BenchReporter,
) -> list[TrainingMeasurement]:
    """Times of steps, in the order of `candidates`; see `bench_training`."""
    contestants = [_Contestant(each, device, shrinks_micro_batches, budget_s, reporter) for each in candidates]
    for index, contestant in enumerate(contestants):
        reporter.advance(f"{contestant.result.name}: first step", index, len(contestants))
        contestant.begin()
    for turn in range(repeats):
        for contestant in contestants:
            if contestant.is_going:
                reporter.advance(f"round {turn + 1}: {contestant.result.name}", turn, repeats)
                contestant.take_turn(turn)
    if all(contestant.result.failed for contestant in contestants):
        raise AsgoError(f"none could take a step: {contestants[0].result.failed}")
    return [contestant.finish() for contestant in contestants]


class _Contestant:
    """A candidate with its model and optimizer, and what has been measured of it."""

    def __init__(
        self, candidate: Candidate, device: torch.device, shrinks: bool, budget_s: float, reporter: BenchReporter
    ) -> None:
        self.result = TrainingMeasurement(candidate.name, candidate.library, candidate.optimizer)
        self.is_going = True
        self._candidate, self._config = candidate, candidate.config
        self._device, self._shrinks, self._left_s, self._reporter = device, shrinks, budget_s, reporter
        self._trainer: Trainer | None = None
        self._last = Lap(0.0, 0.0)
        self._resident_bytes = 0
        self._peaks: list[int] = []

    def begin(self) -> None:
        """Build it and take the first step, with the largest micro-batch that fits."""
        with self._failing_alone():
            graphs = compiled_graphs()
            while not self._first_step_fits():
                self._shrink()
            training = self._config.training
            self.result.micro_batch_size = training.micro_batch_size or training.batch_size
            seconds, has_compiled = self._last.step_ms / 1e3, compiled_graphs() > graphs
            self.result.first_step_s = seconds
            self._reporter.note(f"{self.result.name}: first step {seconds:.3g} s{' with compiling' * has_compiled}")
            if not has_compiled:
                self._spend()

    def take_turn(self, turn: int) -> None:
        """Take a step; one in which torch.compile builds something counts as part of the first."""
        with self._failing_alone():
            assert self._trainer is not None
            assert self.result.first_step_s is not None
            graphs = compiled_graphs()
            before = self._begin_peak()
            self._last = self._trainer.step()
            if before is not None:
                peak = torch.cuda.max_memory_allocated(self._device) - before
                self._peaks.append(self._resident_bytes + peak)
            if compiled_graphs() > graphs:
                self.result.first_step_s += self._last.step_ms / 1e3
            else:
                self.result.samples[turn] = self._last.step_ms / 1e3
                self.result.optimizer_shares.append(self._last.optimizer_ms / self._last.step_ms)
                self._spend()

    def finish(self) -> TrainingMeasurement:
        """What was measured, with the size of the state."""
        if not self.result.failed:
            assert self._trainer is not None
            self.result.state_bytes = state_bytes([self._trainer.optimizer])
            self.result.peak_bytes = max(self._peaks, default=None)
            if not self.result.samples:
                self.result.only_sample_s = self._last.step_ms / 1e3
                self.result.optimizer_shares = [self._last.optimizer_ms / self._last.step_ms]
        self._trainer = None
        return self.result

    def _first_step_fits(self) -> bool:
        """Build the candidate and take its first step; False if that took too much memory and could take less."""
        before = self._begin_peak()
        try:
            self._trainer = self._candidate.build(self._config)
            self._last = self._trainer.step()
        except torch.OutOfMemoryError:
            rows = self._config.training.micro_batch_size or self._config.training.batch_size
            if not self._shrinks or rows == 1:
                raise
            return False
        if before is not None:
            self._resident_bytes = torch.cuda.memory_allocated(self._device) - before
            self._peaks.append(torch.cuda.max_memory_allocated(self._device) - before)
        return True

    def _shrink(self) -> None:
        training = self._config.training
        rows = largest_divisor(training.batch_size, (training.micro_batch_size or training.batch_size) // 2)
        self._config = self._config.model_copy(
            update={"training": training.model_copy(update={"micro_batch_size": rows})}
        )
        self._release()
        torch.compiler.reset()  # else the next graph would be one for all sizes
        self._reporter.note(f"{self.result.name}: out of memory; trying a micro-batch of {rows}")

    def _begin_peak(self) -> int | None:
        """Begin to watch the memory of a GPU; the bytes there are."""
        if self._device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats(self._device)
        return torch.cuda.memory_allocated(self._device)

    def _spend(self) -> None:
        self._left_s -= self._last.step_ms / 1e3
        if self._left_s <= 0 and self.is_going:
            self.is_going = False
            self._reporter.note(f"{self.result.name}: its time is spent, after {len(self.result.samples)} rounds")

    @contextlib.contextmanager
    def _failing_alone(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever becomes of one, the others are measured
            lines = str(error).strip().splitlines()
            self.result.failed = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
            self.is_going = False
            self._reporter.note(f"{self.result.name}: failed: {self.result.failed}")
        if self.result.failed:
            self._release()

    def _release(self) -> None:
        self._trainer = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
