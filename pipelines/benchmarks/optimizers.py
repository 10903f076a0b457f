"""Benchmark of optimizers: time of a step, time of the first step, and size of the state."""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipelines.benchmarks import peers
from pipelines.benchmarks.float64_error import CONDITION, STEPS, float64_error
from pipelines.benchmarks.gradients import GradientSource
from pipelines.benchmarks.peers import BASELINE, Choice
from pipelines.benchmarks.shapes import build_model, shape_counts
from pipelines.benchmarks.turns import (
    BenchReporter,
    Measurement,
    Stepper,
    begin_peak,
    peak_since,
    require_one,
    state_bytes,
    take_first_steps,
    take_rounds,
)
from pipelines.compiler_cache import use_private_compiler_cache
from pipelines.config import RuntimeSettings
from pipelines.training.device import describe_device, pick_device, synchronize

_SEED = 0
# Float32 weights, a large state, and temporary memory of a step.
_NEEDED_BYTES_PER_PARAMETER = 32


@dataclass(frozen=True)
class BenchSettings:
    """What to measure. Empty `names` means the default optimizers, `threads=None` torch's default."""

    model: str = "gpt2-layer"
    names: Sequence[str] = ()
    repeats: int = 10
    budget_s: float = 20.0
    threads: int | None = None
    runtime: RuntimeSettings = field(default_factory=RuntimeSettings)


@dataclass(frozen=True)
class Report:
    """Results of a benchmark: model, device, versions, and one measurement per optimizer."""

    model: str
    parameters: int
    shapes: Sequence[tuple[tuple[int, ...], int]]
    device: str
    device_type: str
    threads: int
    torch_version: str
    versions: dict[str, str]
    repeats: int
    budget_s: float
    left_out: Sequence[str]
    error_condition: float
    error_steps: int
    measurements: Sequence[Measurement]

    @property
    def baseline(self) -> Measurement:
        """Fused AdamW of torch, which is always measured."""
        return next(each for each in self.measurements if each.name == BASELINE)

    @property
    def torch_muon(self) -> Measurement | None:
        """Muon of torch, if it was measured."""
        muons = (each for each in self.measurements if (each.library, each.optimizer) == ("torch", "Muon"))
        return next((each for each in muons if not each.failed), None)

    def as_json(self) -> dict[str, Any]:
        """Return the report as plain values for JSON; an error that is not finite becomes None."""
        return {
            "model": self.model,
            "parameters": self.parameters,
            "shapes": [{"shape": list(shape), "count": count} for shape, count in self.shapes],
            "device": self.device,
            "device_type": self.device_type,
            "threads": self.threads,
            "torch": self.torch_version,
            "libraries": self.versions,
            "repeats": self.repeats,
            "budget_s": self.budget_s,
            "baseline": BASELINE,
            "error_condition": self.error_condition,
            "error_steps": self.error_steps,
            "left_out": list(self.left_out),
            "optimizers": [self._row(each) for each in self.measurements],
        }

    def _row(self, each: Measurement) -> dict[str, Any]:
        samples = each.step_samples_s
        return {
            "name": each.name,
            "library": each.library,
            "optimizer": each.optimizer,
            "failed": each.failed,
            "median_ms": _milliseconds(each.median_s),
            "spread": each.spread,
            "min_ms": _milliseconds(min(samples, default=None)),
            "max_ms": _milliseconds(max(samples, default=None)),
            "mean_ms": _milliseconds(statistics.fmean(samples) if samples else None),
            "samples_ms": [_milliseconds(seconds) for seconds in samples],
            "repeats": len(each.samples),
            "first_step_ms": _milliseconds(each.first_step_s),
            "ratio_to_baseline": each.ratio_to(self.baseline),
            "ratio_to_torch_muon": each.ratio_to(self.torch_muon) if self.torch_muon else None,
            "state_bytes": each.state_bytes,
            "state_bytes_per_parameter": None if each.state_bytes is None else each.state_bytes / self.parameters,
            "step_peak_bytes": each.peak_bytes,
            "error": each.error if each.error is not None and math.isfinite(each.error) else None,
        }


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def bench_optimizers(settings: BenchSettings, reporter: BenchReporter) -> Report:
    """Measure every chosen optimizer on the parameters of one model, all with the same gradients.

    First each optimizer is built and takes its first step. Then, in each of `repeats` rounds, each takes one step. An
    optimizer that has used `budget_s` seconds stops; if its first step already took that long, it is the only sample. A
    step in which torch.compile compiles is not a sample and does not count against the budget. An optimizer that raises
    is reported as failed.

    Raises `UsageError` for an unknown model, optimizer or device, and `AsgoError` if all optimizers fail.
    """
    use_private_compiler_cache()
    device = pick_device(settings.runtime)
    choices, left_out = peers.choose(settings.names)
    model = build_model(settings.model).to(device)
    for line in left_out:
        reporter.note(line)
    # Prints of other libraries must not mix with the data on stdout.
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
    """Measure the optimizers on copies of `model`; return the results in the order of `choices`."""
    gradients = GradientSource(list(model.parameters()), _SEED)
    gradients.renew()
    contestants = [_Contestant(choice, model, gradients, budget_s, reporter) for choice in choices]
    take_first_steps(contestants, reporter)
    require_one(contestants, "no optimizer")
    take_rounds(contestants, repeats, reporter, prepare=gradients.renew)
    for contestant in contestants:
        contestant.finish()
    return [contestant.result for contestant in contestants]


class _Contestant(Stepper):
    """An optimizer with its own copy of the model."""

    def __init__(
        self, choice: Choice, model: nn.Module, gradients: GradientSource, budget_s: float, reporter: BenchReporter
    ) -> None:
        super().__init__(Measurement(choice.name, choice.library, choice.optimizer), budget_s, reporter)
        self._choice, self._template, self._gradients = choice, model, gradients
        self._params: list[nn.Parameter] = []
        self._optimizers: list[torch.optim.Optimizer] = []
        self._peaks: list[int] = []

    def first_step(self) -> float:
        _check_memory(self._template)
        model = copy.deepcopy(self._template)
        self._params = list(model.parameters())
        self._optimizers = self._choice.build(model)
        return self.step()

    def step(self) -> float:
        device = self._params[0].device
        self._gradients.lend(self._params)
        before = begin_peak(device)
        synchronize(device)
        began = time.perf_counter()
        for optimizer in self._optimizers:
            optimizer.step()
        synchronize(device)
        seconds = time.perf_counter() - began
        self._peaks += peak_since(device, before)
        return seconds

    def weigh(self) -> None:
        self.result.state_bytes = state_bytes(self._optimizers)
        # The first step also allocates the state, so leave it out.
        self.result.peak_bytes = max(self._peaks[1:] or self._peaks, default=None)

    def release(self) -> None:
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
        except Exception as error:  # the step times are still valid
            reporter.note(f"{choice.name}: no error against float64: {type(error).__name__}: {error}")


def _check_memory(model: nn.Module) -> None:
    """Raise `MemoryError` if memory is so low that the system would kill the process."""
    param = next(model.parameters())
    needed = _NEEDED_BYTES_PER_PARAMETER * sum(param.numel() for param in model.parameters())
    free = free_bytes(param.device)
    if free is not None and free < needed:
        raise MemoryError(
            f"needs about {needed / 1e9:.1f} GB of memory, but {free / 1e9:.1f} GB are free; "
            "choose fewer optimizers with --optimizer, or a smaller --model"
        )


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes of memory available on a device, or None if unknown."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    sizes = {name: int(size.split()[0]) for name, _, size in (line.partition(":") for line in lines)}
    return 1024 * sizes["MemAvailable"]


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
