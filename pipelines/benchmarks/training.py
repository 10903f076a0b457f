"""Whole training steps side by side: the loop of `asgo train gpt` by optimizer, and plain PyTorch."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from models.gpt import GPT
from pipelines.benchmarks.optimizers import BenchReporter
from pipelines.benchmarks.plain_gpt import PlainTrainer
from pipelines.benchmarks.random_tokens import write_random_tokens
from pipelines.benchmarks.trainers import LoopTrainer, Trainer
from pipelines.benchmarks.training_report import PLAIN, TrainingReport, TrainingWork
from pipelines.benchmarks.training_turns import Candidate, measure
from pipelines.benchmarks.training_workload import (
    CPU_SIZE,
    GPU_SIZE,
    TrainingBenchSettings,
    Workload,
    choose_workload,
    configure,
)
from pipelines.benchmarks.utilization import flops_per_token, peak_flops
from pipelines.compiler_cache import use_private_compiler_cache
from pipelines.config import GPTRunConfig, RuntimeSettings
from pipelines.data.batches import open_token_data
from pipelines.training.device import describe_device, pick_device, pick_precision
from pipelines.training.gpt_task import build_decoder

_BATCHES_OF_TOKENS = 4


def bench_training(settings: TrainingBenchSettings, reporter: BenchReporter) -> TrainingReport:
    """Measure steps of the training loop with every optimizer, and of plain PyTorch, on random tokens.

    A step is a whole one: forward, backward, accumulation, clipping, optimizer. Settings are the preset's of the model,
    but there is no dropout. First each candidate is built and takes its first step. Then they take turns, a step each
    in a round. One that has spent `budget_s` seconds takes no further turn; a step in which torch.compile is at work is
    neither a sample nor paid from the budget. Where no micro-batch size is asked for, it shrinks until it fits into
    the memory. A candidate that raises is reported as failed.

    Raises `UsageError` for a model, an optimizer, a size or a device that cannot be, `AsgoError` if all have failed.
    """
    use_private_compiler_cache()
    device = pick_device(RuntimeSettings(device=settings.device))
    size = GPU_SIZE if device.type == "cuda" else CPU_SIZE
    workload = choose_workload(settings, size)
    compiled = device.type == "cuda" if settings.compile is None else settings.compile
    # What torch.compile prints must not end up in data on stdout.
    with tempfile.TemporaryDirectory(prefix="asgo-bench-") as name, contextlib.redirect_stdout(sys.stderr):
        folder = Path(name)
        config = configure(workload, settings, "adamw", folder, compiled)  # that of plain PyTorch, too
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
        is_cpu_size=size is CPU_SIZE and settings.model is None and settings.batch_size is None,
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
    assert isinstance(model, GPT)
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
        compiled=config.runtime.compile,
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
