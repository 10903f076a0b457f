"""Optimizers side by side: the time of a step, what the first one costs, and the size of the state."""

from __future__ import annotations

import contextlib
import copy
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from pipelines.benchmarks import peers
from pipelines.benchmarks.float64_error import CONDITION, STEPS, float64_error
from pipelines.benchmarks.gradients import GradientSource
from pipelines.benchmarks.peers import Choice
from pipelines.benchmarks.report import Measurement, Report
from pipelines.benchmarks.shapes import build_model, shape_counts
from pipelines.benchmarks.state_size import state_bytes
from pipelines.compiler_cache import use_private_compiler_cache
from pipelines.config import RuntimeSettings
from pipelines.errors import AsgoError
from pipelines.training.device import describe_device, pick_device, synchronize

_SEED = 0
# Float32 weights, the state of a hungry optimizer, and what its step needs for a moment.
_BYTES_TO_BEGIN_A_PARAMETER = 32


@dataclass(frozen=True)
class BenchSettings:
    """What to measure: `names` empty for the default ones, `threads` None for torch's own number."""

    model: str = "gpt2-layer"
    names: Sequence[str] = ()
    repeats: int = 10
    budget_s: float = 20.0
    threads: int | None = None
    runtime: RuntimeSettings = field(default_factory=RuntimeSettings)


class BenchReporter(Protocol):
    """Whoever shows how a benchmark goes."""

    def note(self, message: str) -> None:
        """Something has happened that is worth a line."""

    def advance(self, what: str, done: int, total: int) -> None:
        """`what` begins; `done` of `total` turns have been taken before."""


def bench_optimizers(settings: BenchSettings, reporter: BenchReporter) -> Report:
    """Measure every chosen optimizer on the parameters of one model, all with the same gradients.

    First each optimizer is built and takes its first step. Then they take turns: in each of `repeats` rounds, each
    takes one step. One that has spent `budget_s` seconds takes no further turn; if its first step alone took that long,
    that is its only sample. A step in which torch.compile is at work is neither a sample nor paid from the budget. An
    optimizer that raises is reported as failed.

    Raises `UsageError` for a model, an optimizer or a device that is not there, `AsgoError` if all have failed.
    """
    use_private_compiler_cache()
    device = pick_device(settings.runtime)
    choices, left_out = peers.choose(settings.names)
    model = build_model(settings.model).to(device)
    for line in left_out:
        reporter.note(line)
    # What a peer prints must not end up in data on stdout.
    with _threads(settings.threads), contextlib.redirect_stdout(sys.stderr):
        measurements = measure(choices, model, repeats=settings.repeats, budget_s=settings.budget_s, reporter=reporter)
        _measure_errors(measurements, choices, device, reporter)
        return Report(
            model=settings.model,
            parameters=sum(param.numel() for param in model.parameters()),
            shapes=shape_counts(model),
            device=describe_device(device),
            device_type=device.type,
            threads=torch.get_num_threads(),
            torch_version=torch.__version__,
            versions=peers.versions(choices),
            repeats=settings.repeats,
            budget_s=settings.budget_s,
            left_out=left_out,
            error_condition=CONDITION,
            error_steps=STEPS,
            measurements=measurements,
        )


def measure(
    choices: Sequence[Choice], model: nn.Module, *, repeats: int, budget_s: float, reporter: BenchReporter
) -> list[Measurement]:
    """Times and state sizes of the optimizers on copies of `model`, in the order of `choices`; see above."""
    gradients = GradientSource(list(model.parameters()), _SEED)
    gradients.renew()
    contestants = [_Contestant(choice, model, gradients, budget_s, reporter) for choice in choices]
    for index, contestant in enumerate(contestants):
        reporter.advance(f"{contestant.result.name}: first step", index, len(contestants))
        contestant.begin()
    if all(contestant.result.failed for contestant in contestants):
        raise AsgoError(f"no optimizer could take a step: {contestants[0].result.failed}")
    for turn in range(repeats):
        gradients.renew()
        for contestant in contestants:
            if contestant.is_going:
                reporter.advance(f"round {turn + 1}: {contestant.result.name}", turn, repeats)
                contestant.take_turn(turn)
    return [contestant.finish() for contestant in contestants]


class _Contestant:
    """An optimizer with its own copy of the model, and what has been measured of it."""

    def __init__(
        self, choice: Choice, model: nn.Module, gradients: GradientSource, budget_s: float, reporter: BenchReporter
    ) -> None:
        self.result = Measurement(choice.name, choice.library, choice.optimizer)
        self.is_going = True
        self._choice = choice
        self._template = model
        self._gradients = gradients
        self._left_s = budget_s
        self._reporter = reporter
        self._params: list[nn.Parameter] = []
        self._optimizers: list[torch.optim.Optimizer] = []
        self._last_s = 0.0
        self._peaks: list[int] = []

    def begin(self) -> None:
        """Build the optimizer and take the first step."""
        with self._failing_alone():
            _check_memory(self._template)
            model = copy.deepcopy(self._template)
            self._params = list(model.parameters())
            self._optimizers = self._choice.build(model)
            seconds, has_compiled = self._step()
            self.result.first_step_s = seconds
            self._reporter.note(f"{self.result.name}: first step {seconds:.3g} s{' with compiling' * has_compiled}")
            if not has_compiled:
                self._spend(seconds)

    def take_turn(self, turn: int) -> None:
        """Take a step; one in which torch.compile builds something counts as part of the first."""
        with self._failing_alone():
            seconds, has_compiled = self._step()
            if has_compiled:
                assert self.result.first_step_s is not None
                self.result.first_step_s += seconds
            else:
                self.result.samples[turn] = seconds
                self._spend(seconds)

    def finish(self) -> Measurement:
        """What was measured, with the size of the state."""
        if not self.result.failed:
            self.result.state_bytes = state_bytes(self._optimizers)
            # The first step allocates the state, too.
            self.result.peak_bytes = max(self._peaks[1:] or self._peaks, default=None)
            if not self.result.samples:
                self.result.only_sample_s = self._last_s
        self._release()
        return self.result

    def _step(self) -> tuple[float, bool]:
        """Seconds of a step, and whether torch.compile was at work in it."""
        device = self._params[0].device
        self._gradients.lend(self._params)
        graphs = _compiled_graphs()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        synchronize(device)
        began = time.perf_counter()
        for optimizer in self._optimizers:
            optimizer.step()
        synchronize(device)
        self._last_s = time.perf_counter() - began
        if device.type == "cuda":
            self._peaks.append(torch.cuda.max_memory_allocated(device) - before)
        return self._last_s, _compiled_graphs() > graphs

    def _spend(self, seconds: float) -> None:
        self._left_s -= seconds
        if self._left_s <= 0 and self.is_going:
            self.is_going = False
            self._reporter.note(f"{self.result.name}: its time is spent, after {len(self.result.samples)} rounds")

    @contextlib.contextmanager
    def _failing_alone(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a peer does, the others are measured
            lines = str(error).strip().splitlines()
            self.result.failed = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
            self.is_going = False
            self._reporter.note(f"{self.result.name}: failed: {self.result.failed}")
        if self.result.failed:
            self._release()

    def _release(self) -> None:
        self._params, self._optimizers = [], []


def _measure_errors(
    measurements: Sequence[Measurement], choices: Sequence[Choice], device: torch.device, reporter: BenchReporter
) -> None:
    for index, (measurement, choice) in enumerate(zip(measurements, choices, strict=True)):
        if measurement.failed:
            continue
        reporter.advance(f"{choice.name}: error against float64", index, len(choices))
        try:
            measurement.error = float64_error(choice, device)
        except Exception as error:  # as above
            reporter.note(f"{choice.name}: no error against float64: {type(error).__name__}: {error}")


def _check_memory(model: nn.Module) -> None:
    """Refuse to begin where the system would have to kill the program."""
    param = next(model.parameters())
    needed = _BYTES_TO_BEGIN_A_PARAMETER * sum(param.numel() for param in model.parameters())
    free = free_bytes(param.device)
    if free is not None and free < needed:
        raise MemoryError(
            f"about {needed / 1e9:.1f} GB of memory are needed and {free / 1e9:.1f} GB are free; "
            "choose fewer optimizers with --optimizer, or a smaller --model"
        )


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be had on a device, or None where the system does not say."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    sizes = {name: int(size.split()[0]) for name, _, size in (line.partition(":") for line in lines)}
    return 1024 * sizes["MemAvailable"]


def _compiled_graphs() -> int:
    """How many graphs torch.compile has captured in this process."""
    utils = sys.modules.get("torch._dynamo.utils")  # not imported means that nothing was compiled
    return utils.counters["stats"]["unique_graphs"] if utils is not None else 0


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
