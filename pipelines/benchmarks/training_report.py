"""What a benchmark of whole training steps found."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pipelines.benchmarks.report import Measurement

PLAIN = "plain PyTorch, AdamW"


@dataclass
class TrainingMeasurement(Measurement):
    """What was measured of whole steps; `peak_bytes` counts the weights and the optimizer's state too.

    `optimizer_shares` are the optimizer's shares of the steps in `step_samples_s`.
    """

    micro_batch_size: int = 0
    optimizer_shares: list[float] = field(default_factory=list)

    @property
    def optimizer_share(self) -> float | None:
        """The optimizer's share of a step, the median; None where it failed."""
        return statistics.median(self.optimizer_shares) if not self.failed else None


@dataclass(frozen=True)
class TrainingWork:
    """What all of them did: the model, and the work of a step."""

    model: str
    parameters: int
    layers: int
    heads: int
    d_model: int
    context_length: int
    vocab_size: int
    batch_size: int
    flops_per_token: int
    precision: str
    compiled: bool

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a global batch."""
        return self.batch_size * self.context_length


@dataclass(frozen=True)
class TrainingReport:
    """A whole benchmark of training: where, on what, and a measurement a candidate.

    `peak_flops` is None where the device's is not known, or the precision is not the one it holds for.
    """

    work: TrainingWork
    is_cpu_size: bool
    device: str
    device_type: str
    threads: int
    torch_version: str
    peak_flops: float | None
    repeats: int
    budget_s: float
    measurements: Sequence[TrainingMeasurement]

    @property
    def plain(self) -> TrainingMeasurement:
        """Plain PyTorch, which always takes part."""
        return next(each for each in self.measurements if each.name == PLAIN)

    def tokens_per_s(self, each: TrainingMeasurement) -> float | None:
        """Tokens a second."""
        return None if each.median_s is None else self.work.tokens_per_step / each.median_s

    def speed(self, each: TrainingMeasurement) -> float | None:
        """Tokens a second as a multiple of plain PyTorch's: the median over the rounds that both were in."""
        ratio = each.ratio_to(self.plain)
        return None if ratio is None else 1 / ratio

    def utilization(self, each: TrainingMeasurement) -> float | None:
        """Model FLOP utilization: the model's arithmetic a second as a share of the device's peak."""
        rate = self.tokens_per_s(each)
        return None if rate is None or self.peak_flops is None else rate * self.work.flops_per_token / self.peak_flops

    def as_json(self) -> dict[str, Any]:
        """Everything, in plain types."""
        return {
            **asdict(self.work),
            "tokens_per_step": self.work.tokens_per_step,
            "is_cpu_size": self.is_cpu_size,
            "device": self.device,
            "device_type": self.device_type,
            "threads": self.threads,
            "torch": self.torch_version,
            "peak_flops": self.peak_flops,
            "repeats": self.repeats,
            "budget_s": self.budget_s,
            "baseline": PLAIN,
            "candidates": [self._row(each) for each in self.measurements],
        }

    def _row(self, each: TrainingMeasurement) -> dict[str, Any]:
        return {
            "name": each.name,
            "failed": each.failed,
            "micro_batch_size": each.micro_batch_size,
            "tokens_per_s": self.tokens_per_s(each),
            "median_ms": None if each.median_s is None else 1e3 * each.median_s,
            "spread": each.spread,
            "samples_ms": [] if each.failed else [1e3 * seconds for seconds in each.step_samples_s],
            "repeats": len(each.samples),
            "first_step_s": each.first_step_s,
            "optimizer_share": each.optimizer_share,
            "utilization": self.utilization(each),
            "speed": self.speed(each),
            "state_bytes": each.state_bytes,
            "peak_bytes": each.peak_bytes,
        }
