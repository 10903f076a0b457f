"""What a benchmark of optimizers found."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.benchmarks.peers import BASELINE


@dataclass
class Measurement:
    """What was measured of one optimizer; empty where it failed before.

    `samples` are the seconds of a step by round. `first_step_s` is the first step and all later ones in which
    torch.compile was at work; `only_sample_s` is the last step where no round gave a sample. `peak_bytes`, on CUDA, is
    what a step needs beyond what was there before it.
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
        """The samples in order; where no round gave one, the last step."""
        return list(self.samples.values()) or ([] if self.only_sample_s is None else [self.only_sample_s])

    @property
    def median_s(self) -> float | None:
        """The median time of a step."""
        return statistics.median(self.step_samples_s) if not self.failed else None

    @property
    def spread(self) -> float | None:
        """Half of what lies between the quartiles, as a share of the median; None for fewer than two samples."""
        if self.median_s is None or len(self.samples) < 2:
            return None
        first, _, third = statistics.quantiles(self.samples.values(), n=4, method="inclusive")
        return (third - first) / 2 / self.median_s

    def ratio_to(self, other: Measurement) -> float | None:
        """How many times longer a step takes than one of `other`: the median over the rounds that both were in.

        Where they share no round, the ratio of their medians.
        """
        if self.median_s is None or other.median_s is None:
            return None
        shared = [seconds / other.samples[turn] for turn, seconds in self.samples.items() if turn in other.samples]
        return statistics.median(shared) if shared else self.median_s / other.median_s


@dataclass(frozen=True)
class Report:
    """A whole benchmark: where it was made, on what, and a measurement an optimizer."""

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
        """Everything, in plain types; a figure that is not finite is None."""
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
