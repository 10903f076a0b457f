"""Benchmark of whole training steps: the loop of `asgo train gpt` by optimizer, and plain PyTorch."""

from __future__ import annotations

import contextlib
import gc
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from models.gpt import GPT
from models.transformer import Transformer
from pipelines.benchmarks.batches import write_random_tokens
from pipelines.benchmarks.plain_trainer import PlainTrainer
from pipelines.benchmarks.trainers import LoopTrainer, Trainer
from pipelines.benchmarks.training_workload import (
    CPU_SIZE,
    GPU_SIZE,
    TrainingBenchSettings,
    Workload,
    choose_workload,
    configure,
)
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
from pipelines.benchmarks.utilization import flops_per_token, peak_flops
from pipelines.compiler_cache import use_private_compiler_cache
from pipelines.config import GPTRunConfig, RuntimeSettings
from pipelines.data.batches import open_token_data
from pipelines.errors import UsageError
from pipelines.training.clock import Lap
from pipelines.training.device import compiles, describe_device, pick_device, pick_precision
from pipelines.training.distributed import largest_divisor
from pipelines.training.gpt_task import build_decoder

_BATCHES_OF_TOKENS = 4
PLAIN = "plain PyTorch, AdamW"


@dataclass
class TrainingMeasurement(Measurement):
    """Measurement of whole steps; `peak_bytes` includes the weights and the optimizer's state.

    `optimizer_shares` are the optimizer's fractions of the times in `step_samples_s`.
    """

    micro_batch_size: int = 0
    optimizer_shares: list[float] = field(default_factory=list)

    @property
    def optimizer_share(self) -> float | None:
        """The optimizer's fraction of a step, median; None if it failed."""
        return statistics.median(self.optimizer_shares) if not self.failed else None


@dataclass(frozen=True)
class TrainingWork:
    """What all candidates train: the model, and the work of a step."""

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
    """Results of a benchmark: work, device, versions, and one measurement per candidate.

    `peak_flops` is None if the device's peak is unknown, or the precision is not bfloat16.
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
        """Plain PyTorch, which is always measured."""
        return next(each for each in self.measurements if each.name == PLAIN)

    def tokens_per_s(self, each: TrainingMeasurement) -> float | None:
        """Return the tokens per second; None if it failed."""
        return None if each.median_s is None else self.work.tokens_per_step / each.median_s

    def speed(self, each: TrainingMeasurement) -> float | None:
        """Return the tokens per second relative to plain PyTorch, median over the rounds of both."""
        ratio = each.ratio_to(self.plain)
        return None if ratio is None else 1 / ratio

    def utilization(self, each: TrainingMeasurement) -> float | None:
        """Return the model FLOP utilization: FLOP per second of the model over the device's peak; None if unknown."""
        rate = self.tokens_per_s(each)
        return None if rate is None or self.peak_flops is None else rate * self.work.flops_per_token / self.peak_flops

    def as_json(self) -> dict[str, Any]:
        """Return the report as plain values for JSON."""
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


def bench_training(settings: TrainingBenchSettings, reporter: BenchReporter) -> TrainingReport:
    """Measure steps of the training loop with every optimizer, and of plain PyTorch, on random tokens.

    A step is forward, backward, accumulation, clipping and optimizer. Settings are those of the model's preset, but
    without dropout. First each candidate is built and takes its first step. Then, in each round, each takes one step. A
    candidate that has used `budget_s` seconds stops; a step in which torch.compile compiles is not a sample and does
    not count against the budget. Unless the settings give a micro-batch size, it shrinks until it fits the memory. A
    candidate that raises is reported as failed.

    Raises `UsageError` for an invalid model, optimizer, size or device, and `AsgoError` if all candidates fail.
    """
    use_private_compiler_cache()
    device = pick_device(RuntimeSettings(device=settings.device))
    size = GPU_SIZE if device.type == "cuda" else CPU_SIZE
    workload = choose_workload(settings, size)
    compiled = device.type == "cuda" if settings.compile is None else settings.compile
    # Prints of torch.compile must not mix with the data on stdout.
    with tempfile.TemporaryDirectory(prefix="asgo-bench-") as name, contextlib.redirect_stdout(sys.stderr):
        folder = Path(name)
        config = configure(workload, settings, "adamw", folder, compiled)  # also used for plain PyTorch
        configs = {text: configure(workload, settings, text, folder, compiled) for text in settings.optimizers}
        write_random_tokens(folder, workload.tokenizer, _BATCHES_OF_TOKENS * workload.tokens_per_step + 1)
        work = _describe_work(workload, config, device)
        measurements = measure(
            [_plain_candidate(config, work.vocab_size, device), *_loop_candidates(configs, device)],
            device,
            shrinks_micro_batches=settings.micro_batch_size is None,
            repeats=settings.repeats,
            budget_s=settings.budget_s,
            reporter=reporter,
        )
    return TrainingReport(
        work=work,
        is_cpu_size=size is CPU_SIZE and not (settings.model or settings.preset or settings.batch_size),
        device=describe_device(device),
        device_type=device.type,
        threads=torch.get_num_threads(),
        torch_version=torch.__version__,
        peak_flops=peak_flops(describe_device(device)) if work.precision == "bfloat16" else None,
        repeats=settings.repeats,
        budget_s=settings.budget_s,
        measurements=measurements,
    )


def _describe_work(workload: Workload, config: GPTRunConfig, device: torch.device) -> TrainingWork:
    with torch.device("meta"):
        model = build_decoder(config.model, workload.tokenizer.vocab_size)
    if not isinstance(model, GPT | Transformer):
        raise UsageError(f"--preset {workload.preset}: a {config.model.kind}, which this benchmark does not know")
    return TrainingWork(
        model=workload.model,
        parameters=sum(param.numel() for param in model.parameters()),
        layers=config.model.n_layers,
        heads=config.model.n_heads,
        d_model=config.model.d_model,
        context_length=workload.context_length,
        vocab_size=model.token_embedding.num_embeddings,
        batch_size=workload.batch_size,
        flops_per_token=flops_per_token(model, config.model),
        precision=str(pick_precision(config.training, device)).removeprefix("torch."),
        compiled=compiles(config.runtime, device),
    )


def _plain_candidate(config: GPTRunConfig, vocab_size: int, device: torch.device) -> Candidate:
    def build(config: GPTRunConfig) -> Trainer:
        torch.manual_seed(config.seed)
        tokens = open_token_data(Path(config.data.folder)).train[0].read()
        return PlainTrainer(config, tokens, vocab_size, device, pick_precision(config.training, device))

    return Candidate(PLAIN, "torch", "AdamW", config, build)


def _loop_candidates(configs: Mapping[str, GPTRunConfig], device: torch.device) -> list[Candidate]:
    def build(config: GPTRunConfig) -> Trainer:
        return LoopTrainer(config, device)

    return [Candidate(text, "asgo", config.optimizer.name, config, build) for text, config in configs.items()]


@dataclass(frozen=True)
class Candidate:
    """One way to train: its name, the library of its optimizer, and how to build it from a configuration."""

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
    """Measure the candidates' steps; return the results in the order of `candidates`. See `bench_training`."""
    contestants = [_Contestant(each, device, shrinks_micro_batches, budget_s, reporter) for each in candidates]
    take_first_steps(contestants, reporter)
    take_rounds(contestants, repeats, reporter)
    require_one(contestants, "none")
    for contestant in contestants:
        contestant.finish()
    return [contestant.training for contestant in contestants]


class _Contestant(Stepper):
    """A candidate with its model and optimizer."""

    def __init__(
        self, candidate: Candidate, device: torch.device, shrinks: bool, budget_s: float, reporter: BenchReporter
    ) -> None:
        self.training = TrainingMeasurement(candidate.name, candidate.library, candidate.optimizer)
        super().__init__(self.training, budget_s, reporter)
        self._candidate, self._config = candidate, candidate.config
        self._device, self._shrinks = device, shrinks
        self._trainer: Trainer | None = None
        self._lap = Lap(0.0, 0.0)
        self._resident_bytes = 0
        self._peaks: list[int] = []

    def first_step(self) -> float:
        """Take the first step with the largest micro-batch that fits."""
        while not self._first_step_fits():
            self._shrink()
        training = self._config.training
        self.training.micro_batch_size = training.micro_batch_size or training.batch_size
        return self._lap.step_ms / 1e3

    def step(self) -> float:
        assert self._trainer is not None
        before = begin_peak(self._device)
        self._lap = self._trainer.step()
        self._peaks += [self._resident_bytes + peak for peak in peak_since(self._device, before)]
        return self._lap.step_ms / 1e3

    def take_turn(self, turn: int) -> None:
        super().take_turn(turn)
        if turn in self.result.samples:
            self.training.optimizer_shares.append(self._lap.optimizer_ms / self._lap.step_ms)

    def weigh(self) -> None:
        assert self._trainer is not None
        self.result.state_bytes = state_bytes([self._trainer.optimizer])
        self.result.peak_bytes = max(self._peaks, default=None)
        if not self.result.samples:
            self.training.optimizer_shares = [self._lap.optimizer_ms / self._lap.step_ms]

    def release(self) -> None:
        self._trainer = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _first_step_fits(self) -> bool:
        """Build the candidate and take its first step; return False if out of memory and the micro-batch can shrink."""
        before = begin_peak(self._device)
        try:
            self._trainer = self._candidate.build(self._config)
            self._lap = self._trainer.step()
        except torch.OutOfMemoryError:
            rows = self._config.training.micro_batch_size or self._config.training.batch_size
            if not self._shrinks or rows == 1:
                raise
            return False
        if before is not None:
            self._resident_bytes = torch.cuda.memory_allocated(self._device) - before
            self._peaks += peak_since(self._device, before)
        return True

    def _shrink(self) -> None:
        training = self._config.training
        rows = largest_divisor(training.batch_size, (training.micro_batch_size or training.batch_size) // 2)
        self._config = self._config.model_copy(
            update={"training": training.model_copy(update={"micro_batch_size": rows})}
        )
        self.release()
        torch.compiler.reset()  # otherwise torch.compile would make the batch size dynamic, and the graph slower
        self.reporter.note(f"{self.result.name}: out of memory; trying a micro-batch of {rows}")
