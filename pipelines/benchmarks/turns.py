"""Harness of the benchmarks: contestants take turns, so a slower phase of the machine slows all alike."""

from __future__ import annotations

import contextlib
import statistics
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from pipelines.errors import AsgoError

Progress = Callable[[str, int, int], None]
"""Called with (what, turns done, turns) when a turn begins."""


def spread_of(samples: Collection[float]) -> float | None:
    """Return half the interquartile range over the median; None for fewer than two samples."""
    if len(samples) < 2:
        return None
    first, _, third = statistics.quantiles(samples, n=4, method="inclusive")
    return (third - first) / 2 / statistics.median(samples)


def median_ratio(own: Sequence[float], other: Sequence[float]) -> float:
    """Return the median ratio of two contestants that took part in the same rounds."""
    return statistics.median(a / b for a, b in zip(own, other, strict=True))


@dataclass
class Contestant:
    """One way to do the work, and its rate in each round."""

    name: str
    rates: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The median rate."""
        return statistics.median(self.rates)

    @property
    def spread(self) -> float:
        """See `spread_of`; 0 for fewer than two rounds."""
        return spread_of(self.rates) or 0.0

    def speedup(self, over: Contestant) -> float:
        """Return the speed relative to another contestant, median over the rounds."""
        return median_ratio(self.rates, over.rates)


def in_turns(
    ways: Mapping[str, Callable[[], float]], repeats: int, progress: Progress, turns_after: int = 0
) -> dict[str, list[float]]:
    """Call each way once per round; return the measurements. `progress` counts `turns_after` more turns."""
    measured: dict[str, list[float]] = {name: [] for name in ways}
    turns = [name for _ in range(repeats) for name in ways]
    for done, name in enumerate(turns):
        progress(name, done, len(turns) + turns_after)
        measured[name].append(ways[name]())
    return measured


class BenchReporter(Protocol):
    """Shows the progress of a benchmark."""

    def note(self, message: str) -> None:
        """Show a line for the user."""

    def advance(self, what: str, done: int, total: int) -> None:
        """`what` begins, after `done` of `total` turns."""


@dataclass
class Measurement:
    """Measurement of one contestant's steps; fields stay empty after a failure.

    `samples` are the seconds of a step by round. `first_step_s` is the time of the first step and of all later steps in
    which torch.compile compiled; `only_sample_s` is the last step if no round gave a sample. `peak_bytes`, on CUDA, is
    the memory that a step allocates beyond what was allocated before it.
    """

    name: str
    library: str
    optimizer: str
    samples: dict[int, float] = field(default_factory=dict)
    first_step_s: float | None = None
    only_sample_s: float | None = None
    state_bytes: int | None = None
    peak_bytes: int | None = None
    error: float | None = None
    failed: str | None = None

    @property
    def step_samples_s(self) -> list[float]:
        """The samples in order; the last step if no round gave one."""
        return list(self.samples.values()) or ([] if self.only_sample_s is None else [self.only_sample_s])

    @property
    def median_s(self) -> float | None:
        """The median time of a step."""
        return statistics.median(self.step_samples_s) if not self.failed else None

    @property
    def spread(self) -> float | None:
        """See `spread_of`; None if it failed."""
        return None if self.failed else spread_of(self.samples.values())

    def ratio_to(self, other: Measurement) -> float | None:
        """Return the step time relative to `other`, median over common rounds.

        Without common rounds, the ratio of the medians.
        """
        if self.median_s is None or other.median_s is None:
            return None
        shared = [seconds / other.samples[turn] for turn, seconds in self.samples.items() if turn in other.samples]
        return statistics.median(shared) if shared else self.median_s / other.median_s


class Stepper(ABC):
    """A contestant that takes one step per round, until it has used `budget_s` seconds or fails.

    A step in which torch.compile compiles is not a sample: it counts for the first step, and not against the budget.
    """

    def __init__(self, result: Measurement, budget_s: float, reporter: BenchReporter) -> None:
        self.result = result
        self.is_going = True
        self.reporter = reporter
        self.last_s = 0.0
        """Seconds of the last step."""
        self._left_s = budget_s

    @abstractmethod
    def first_step(self) -> float:
        """Build the contestant and take the first step; return its seconds."""

    @abstractmethod
    def step(self) -> float:
        """Take a step; return its seconds."""

    @abstractmethod
    def weigh(self) -> None:
        """Add the memory use to the result."""

    @abstractmethod
    def release(self) -> None:
        """Release all memory."""

    def begin(self) -> None:
        """Take the first step."""
        with self._failure_recorded():
            has_compiled = self._compiles(self.first_step)
            self.result.first_step_s = self.last_s
            self.reporter.note(
                f"{self.result.name}: first step {self.last_s:.3g} s{' with compilation' * has_compiled}"
            )
            if not has_compiled:
                self._spend()

    def take_turn(self, turn: int) -> None:
        """Take the step of a round."""
        with self._failure_recorded():
            if self._compiles(self.step):
                assert self.result.first_step_s is not None
                self.result.first_step_s += self.last_s
            else:
                self.result.samples[turn] = self.last_s
                self._spend()

    def finish(self) -> None:
        """Complete the result."""
        if not self.result.failed:
            self.weigh()
            if not self.result.samples:
                self.result.only_sample_s = self.last_s
        self.release()

    def _compiles(self, step: Callable[[], float]) -> bool:
        graphs = compiled_graphs()
        self.last_s = step()
        return compiled_graphs() > graphs

    def _spend(self) -> None:
        self._left_s -= self.last_s
        if self._left_s <= 0 and self.is_going:
            self.is_going = False
            self.reporter.note(f"{self.result.name}: budget used up after {len(self.result.samples)} rounds")

    @contextlib.contextmanager
    def _failure_recorded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # one failure must not stop the others
            lines = str(error).strip().splitlines()
            self.result.failed = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
            self.is_going = False
            self.reporter.note(f"{self.result.name}: failed: {self.result.failed}")
        if self.result.failed:
            self.release()


def take_first_steps(steppers: Sequence[Stepper], reporter: BenchReporter) -> None:
    """Build each contestant and take its first step."""
    for index, stepper in enumerate(steppers):
        reporter.advance(f"{stepper.result.name}: first step", index, len(steppers))
        stepper.begin()


def take_rounds(
    steppers: Sequence[Stepper], repeats: int, reporter: BenchReporter, prepare: Callable[[], None] = lambda: None
) -> None:
    """Take the rounds: a step of each active contestant, after a call of `prepare`."""
    for turn in range(repeats):
        prepare()
        for stepper in steppers:
            if stepper.is_going:
                reporter.advance(f"round {turn + 1}: {stepper.result.name}", turn, repeats)
                stepper.take_turn(turn)


def require_one(steppers: Sequence[Stepper], none: str) -> None:
    """Raise `AsgoError` if all have failed; `none` is the subject of the message, such as "no optimizer"."""
    if all(stepper.result.failed for stepper in steppers):
        raise AsgoError(f"{none} could take a step: {steppers[0].result.failed}")


def compiled_graphs() -> int:
    """Return the number of graphs that torch.compile has captured in this process."""
    utils = sys.modules.get("torch._dynamo.utils")  # not imported: nothing was compiled
    return utils.counters["stats"]["unique_graphs"] if utils is not None else 0


def begin_peak(device: torch.device) -> int | None:
    """Reset the peak memory of a GPU; return the allocated bytes. None for other devices."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak_since(device: torch.device, before: int | None) -> list[int]:
    """Return a list with the peak bytes above those from `begin_peak`; an empty list for other devices."""
    return [] if before is None else [torch.cuda.max_memory_allocated(device) - before]


def state_bytes(optimizers: Sequence[torch.optim.Optimizer]) -> int:
    """Return the bytes of all storages in the states of the optimizers.

    Tensors that share a storage count once. Weights and gradients in a state do not count; step counters that are
    tensors do.
    """
    params = [param for each in optimizers for group in each.param_groups for param in group["params"]]
    grads = [param.grad for param in params if param.grad is not None]
    not_state = {_key(tensor) for tensor in (*params, *grads)}
    sizes = {
        _key(tensor): tensor.untyped_storage().nbytes()
        for each in optimizers
        for state in each.state.values()
        for tensor in _tensors(state)
    }
    return sum(size for key, size in sizes.items() if key not in not_state)


def _key(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a state, through nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
