"""How those who train take turns, that their steps are those of a run, and what is reported of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from pipelines.benchmarks import training, turns
from pipelines.benchmarks.plain_trainer import PlainTrainer
from pipelines.benchmarks.trainers import LoopTrainer, Trainer
from pipelines.benchmarks.training import PLAIN, Candidate, TrainingMeasurement, bench_training, measure
from pipelines.benchmarks.training_workload import (
    CPU_SIZE,
    GPU_SIZE,
    TrainingBenchSettings,
    choose_workload,
    configure,
    largest_divisor,
)
from pipelines.config import GPTRunConfig
from pipelines.data.batches import open_token_data
from pipelines.errors import AsgoError, UsageError
from pipelines.training.clock import Lap
from pipelines.training.train import train

CPU = torch.device("cpu")
SMALL = {"context_length": 16, "batch_size": 4, "micro_batch_size": 2, "repeats": 2, "device": "cpu"}
"""Of the model `tiny`."""


@dataclass
class Stage:
    """Who took a step, how many graphs were compiled, and what was told."""

    graphs: int = 0
    steps: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, message: str) -> None:
        self.notes.append(message)

    def advance(self, what: str, done: int, total: int) -> None:
        assert 0 <= done < total


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    stage = Stage()
    monkeypatch.setattr(turns, "compiled_graphs", lambda: stage.graphs)
    return stage


class Actor:
    """A trainer whose step takes `script(number of the step)` seconds, a quarter of them the optimizer's."""

    def __init__(self, stage: Stage, name: str, script: Callable[[int], float]) -> None:
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1)
        self._stage, self._name, self._script = stage, name, script
        self._count = 0

    def step(self) -> Lap:
        self._count += 1
        self._stage.steps.append(self._name)
        seconds = self._script(self._count)
        return Lap(step_ms=1e3 * seconds, optimizer_ms=250 * seconds)


@pytest.fixture
def config(small_config: Callable[..., GPTRunConfig]) -> GPTRunConfig:
    return small_config(training__batch_size=8, training__micro_batch_size=4, training__max_grad_norm=1.0)


@pytest.fixture
def act(stage: Stage, config: GPTRunConfig) -> Callable[..., dict[str, TrainingMeasurement]]:
    """Measures actors by name: a script, or how to build a trainer from a configuration."""

    def run(
        repeats: int = 4, budget_s: float = 100.0, shrinks: bool = True, **scripts: Callable[[Any], Any]
    ) -> dict[str, TrainingMeasurement]:
        def builder(name: str, script: Callable[[int], float]) -> Callable[[GPTRunConfig], Trainer]:
            return lambda config: Actor(stage, name, script)

        candidates = [
            Candidate(name, "test", name, config, script if name.startswith("built") else builder(name, script))
            for name, script in scripts.items()
        ]
        results = measure(
            candidates, CPU, shrinks_micro_batches=shrinks, repeats=repeats, budget_s=budget_s, reporter=stage
        )
        return {each.name: each for each in results}

    return run


Act = Callable[..., dict[str, TrainingMeasurement]]


def test_all_take_their_first_step_and_then_one_in_each_round(stage: Stage, act: Act) -> None:
    results = act(repeats=2, a=lambda count: {1: 50.0, 2: 3.0, 3: 9.0}[count], b=lambda _: 1.0)
    assert "".join(stage.steps) == "ab" * 3
    a = results["a"]
    assert (a.first_step_s, list(a.samples.values()), a.median_s) == (50.0, [3.0, 9.0], 6.0)
    assert (a.optimizer_share, a.state_bytes, a.peak_bytes, a.micro_batch_size) == (0.25, 0, None, 4)


def test_one_whose_budget_is_spent_stops_and_the_others_go_on(stage: Stage, act: Act) -> None:
    results = act(repeats=6, budget_s=20.0, slow=lambda _: 8.0, fast=lambda _: 1.0)
    assert [len(each.samples) for each in results.values()] == [2, 6]  # 8 s, 16 s, 24 s
    assert "slow: budget used up after 2 rounds" in stage.notes


def test_a_first_step_as_long_as_the_budget_is_the_only_sample(act: Act) -> None:
    endless = act(budget_s=20.0, endless=lambda _: 80.0)["endless"]
    assert (endless.samples, endless.median_s, endless.optimizer_share) == ({}, 80.0, 0.25)


def test_steps_that_compile_belong_to_the_first_and_not_to_the_budget(stage: Stage, act: Act) -> None:
    def compiling(count: int) -> float:
        stage.graphs += count in (1, 2)
        return 60.0 if count in (1, 2) else 2.0

    compiled = act(repeats=4, budget_s=20.0, compiled=compiling)["compiled"]
    assert (compiled.first_step_s, list(compiled.samples.values())) == (120.0, [2.0] * 3)
    assert compiled.optimizer_shares == [0.25] * 3


@pytest.mark.parametrize("failing_step", [1, 3])
def test_one_that_raises_is_failed_and_the_others_are_measured(stage: Stage, act: Act, failing_step: int) -> None:
    def breaking(count: int) -> float:
        if count == failing_step:
            raise RuntimeError("no kernel for this\nand a long trace")
        return 1.0

    results = act(a=lambda _: 1.0, broken=breaking, b=lambda _: 1.0)
    broken = results["broken"]
    assert broken.failed == "RuntimeError: no kernel for this"
    assert (broken.median_s, broken.optimizer_share, broken.state_bytes) == (None, None, None)
    assert [len(results[name].samples) for name in "ab"] == [4, 4]
    with pytest.raises(AsgoError, match="none could take a step: RuntimeError: no kernel"):
        act(broken=breaking)


def test_micro_batches_shrink_until_they_fit_unless_they_were_asked_for(stage: Stage, act: Act) -> None:
    tried: list[int | None] = []

    def build(config: GPTRunConfig) -> Trainer:
        tried.append(config.training.micro_batch_size)
        if tried[-1] != 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return Actor(stage, "built", lambda _: 1.0)

    fitting = act(built=build)["built"]
    assert (tried, fitting.failed, fitting.micro_batch_size) == ([4, 2, 1], None, 1)
    assert "built: out of memory; trying a micro-batch of 2" in stage.notes
    refused = act(built=build, shrinks=False, other=lambda _: 1.0)["built"]
    assert (tried[3:], refused.failed) == ([4], "OutOfMemoryError: CUDA out of memory.")


def test_memory_too_small_for_one_sequence_is_a_failure(act: Act) -> None:
    def build(config: GPTRunConfig) -> Trainer:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    assert act(built=build, other=lambda _: 1.0)["built"].failed == "OutOfMemoryError: CUDA out of memory."


@pytest.mark.parametrize("optimizer", ["accasro", "asgo"])
def test_steps_are_those_of_a_run_bit_for_bit(
    small_config: Callable[..., GPTRunConfig], tmp_path: Path, reporter: Any, optimizer: str
) -> None:
    config = small_config(optimizer__name=optimizer, training__steps=4, training__micro_batch_size=2)
    trainer = LoopTrainer(config, CPU)
    for _ in range(4):
        trainer.step()
    train(config, tmp_path / "run", reporter)
    saved = safetensors.torch.load_file(tmp_path / "run" / "checkpoints" / "step-00000004" / "model.safetensors")
    own = dict(trainer._run.task.model.named_parameters())
    assert all(own[name].equal(saved[name]) for name in own)


def test_only_the_time_in_the_step_counts(
    config: GPTRunConfig, token_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    data = open_token_data(token_folder)
    plain = PlainTrainer(config, data.train[0].read(), data.vocab_size, CPU, torch.float32)
    for trainer in (LoopTrainer(config, CPU), plain):
        assert trainer.step() == Lap(0.0, 0.0)
        now += 100.0  # another one's turn
        assert trainer.step() == Lap(0.0, 0.0)


def test_a_report_has_plain_pytorch_first_and_the_work_of_a_step() -> None:
    settings = TrainingBenchSettings("tiny", ["adamw", "asgo:lr=0.001,beta2=0.5", "adamw"], **SMALL)  # type: ignore[arg-type]
    report = bench_training(settings, Stage())
    assert [each.name for each in report.measurements] == [PLAIN, "adamw", "asgo:lr=0.001,beta2=0.5"]
    assert all(each.failed is None and len(each.samples) == 2 for each in report.measurements)
    work = report.work
    assert (work.model, work.context_length, work.batch_size, work.tokens_per_step) == ("tiny", 16, 4, 64)
    assert (work.layers, work.vocab_size, work.precision, work.compiled) == (4, 257, "float32", False)
    plain, adamw = report.measurements[:2]
    assert plain.median_s is not None
    assert report.tokens_per_s(plain) == 64 / plain.median_s
    assert (report.speed(plain), report.utilization(plain), report.is_cpu_size) == (1.0, None, False)
    assert 0 < (adamw.optimizer_share or 0) < 1
    # Both hold two moments a parameter, and a count of steps a tensor.
    assert all(0 <= (each.state_bytes or 0) - 8 * work.parameters < 4 * 100 for each in (plain, adamw))


def test_twice_the_tokens_a_second_is_twice_the_speed_and_utilization() -> None:
    report = bench_training(TrainingBenchSettings("tiny", ["adamw"], **SMALL), Stage())  # type: ignore[arg-type]
    plain, adamw = report.measurements
    plain.samples, adamw.samples = {0: 2.0, 1: 4.0}, {0: 1.0, 1: 2.0}
    assert (report.tokens_per_s(plain), report.speed(adamw)) == (64 / 3, 2.0)
    object.__setattr__(report, "peak_flops", 1e9)
    assert report.utilization(plain) == pytest.approx(64 / 3 * report.work.flops_per_token / 1e9)
    assert report.utilization(adamw) == pytest.approx(2 * report.utilization(plain))  # type: ignore[operator]


@pytest.mark.parametrize(("preset", "layers", "vocab_size"), [("track3-small", 4, 384), ("llama-tiny", 4, 257)])
def test_a_preset_is_measured_with_its_own_settings(preset: str, layers: int, vocab_size: int) -> None:
    small = {**SMALL, "precision": "bf16"}
    settings = TrainingBenchSettings(optimizers=["adamw", "muon"], preset=preset, **small)  # type: ignore[arg-type]
    report = bench_training(settings, Stage())
    assert [(each.name, each.failed, len(each.samples)) for each in report.measurements] == [
        (name, None, 2) for name in (PLAIN, "adamw", "muon")
    ]
    work = report.work
    assert (work.model, work.layers, work.vocab_size, work.precision) == (preset, layers, vocab_size, "bfloat16")
    plain, adamw, _ = report.measurements
    assert (report.speed(adamw) or 0) > 0
    # Two moments a parameter, of its dtype.
    halves = 384 * 128 if preset == "track3-small" else 0
    assert all(0 <= (each.state_bytes or 0) - 8 * work.parameters + 4 * halves < 4 * 100 for each in (plain, adamw))


def test_the_loop_of_a_preset_has_the_settings_of_its_optimizer(tmp_path: Path) -> None:
    settings = TrainingBenchSettings(preset="track3", batch_size=1, context_length=200)
    config = configure(choose_workload(settings, GPU_SIZE), settings, "muon", tmp_path, True)
    assert config.optimizer_keywords()["ns_coefficients"] == (2.0, -1.5, 0.5)
    assert (config.evaluation.batches, config.evaluation.tokens) == (1, None)
    assert config.data.order == "sequential"


def test_track_3_on_a_gpu_has_its_batch_of_half_a_million_tokens(tmp_path: Path) -> None:
    settings = TrainingBenchSettings(preset="track3")
    workload = choose_workload(settings, GPU_SIZE)
    config = configure(workload, settings, "muon", tmp_path, True)
    work = training._describe_work(workload, config, CPU)
    assert (work.context_length, work.tokens_per_step, work.vocab_size) == (1024, 524_288, 50_304)
    assert work.parameters == 2 * 50_304 * 768 + 50_304 + 26 * 768 + 12 * (12 * 768**2 + 4 * 768 + 3072 + 768)
    assert work.flops_per_token == 6 * (work.parameters - 50_304 * 768) + 12 * 12 * 768 * 1024
    assert config.training.micro_batch_size == 32


def test_on_a_gpu_it_is_gpt2_with_half_a_million_tokens_a_step(tmp_path: Path) -> None:
    settings = TrainingBenchSettings()
    workload = choose_workload(settings, GPU_SIZE)
    config = configure(workload, settings, "asgo", tmp_path, True)
    model = config.model
    assert (model.n_layers, model.n_heads, model.d_model, model.context_length) == (12, 12, 768, 1024)
    work = training._describe_work(workload, config, CPU)
    assert (work.vocab_size, work.tokens_per_step, work.compiled) == (50_304, 524_288, True)
    assert work.parameters == pytest.approx(124.5e6, rel=1e-3)
    assert config.training.micro_batch_size == 32


def test_the_dropout_of_a_preset_is_left_out_since_plain_pytorch_has_none(tmp_path: Path) -> None:
    settings = TrainingBenchSettings("nanogpt")
    config = configure(choose_workload(settings, CPU_SIZE), settings, "asgo", tmp_path, False)
    assert config.model.dropout == 0


@pytest.mark.parametrize(
    ("changes", "batch_size", "micro_batch_size"),
    [
        ({"context_length": 200}, 2608, 163),  # not 2621, which is a prime
        ({"batch_size": 60}, 60, 30),
        ({"micro_batch_size": 24}, 504, 24),
        ({"batch_size": 37, "micro_batch_size": 37}, 37, 37),
    ],
)
def test_what_is_not_said_about_the_batch_follows_from_what_is(
    changes: dict[str, int], batch_size: int, micro_batch_size: int
) -> None:
    chosen = choose_workload(TrainingBenchSettings(**changes), GPU_SIZE)  # type: ignore[arg-type]
    assert (chosen.batch_size, chosen.micro_batch_size) == (batch_size, micro_batch_size)


@pytest.mark.parametrize(("number", "at_most", "divisor"), [(12, 12, 12), (12, 11, 6), (12, 5, 4), (13, 12, 1)])
def test_the_largest_divisor(number: int, at_most: int, divisor: int) -> None:
    assert largest_divisor(number, at_most) == divisor


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "gpt3"}, "--model: unknown model 'gpt3'; did you mean 'gpt2'?"),
        ({"model": None, "preset": "track4"}, "--preset: unknown preset 'track4'; did you mean 'track3'?"),
        ({"preset": "track3"}, "--preset: has a model of its own; leave --model out"),
        ({"micro_batch_size": 3}, "--micro-batch-size 3: does not divide the batch of 4"),
        ({"optimizers": ["asgoo"]}, "--optimizer asgoo: unknown optimizer 'asgoo'; did you mean 'asgo'?"),
        ({"optimizers": ["torch.Muonn"]}, "unknown optimizer of torch.optim: 'Muonn'"),
        ({"optimizers": ["asgo:beta2"]}, "--optimizer asgo:beta2: 'beta2' is not key=value"),
        (
            {"optimizers": ["asgo:beta2=1.5"]},
            "--optimizer asgo:beta2=1.5: optimizer.beta2 = 1.5: should be less than 1",
        ),
        ({"optimizers": ["asgo:beta9=0.5"]}, "optimizer.beta9: unknown key"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_built(changes: dict[str, Any], message: str) -> None:
    settings = TrainingBenchSettings(**{"model": "tiny", "optimizers": ["adamw"], **SMALL, **changes})
    with pytest.raises(UsageError) as caught:
        bench_training(settings, Stage())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["tiny", "track3-small", "llama-tiny"])
def test_a_gpu_adds_memory_and_trains_in_bfloat16(preset: str) -> None:
    small: dict[str, Any] = {**SMALL, "device": "cuda"}
    report = bench_training(TrainingBenchSettings(optimizers=["asgo", "accasro"], preset=preset, **small), Stage())
    assert (report.work.precision, report.work.compiled) == ("bfloat16", True)
    for each in report.measurements:
        assert each.failed is None
        # Weights and state are there at any moment, and so is a gradient a weight at the end of the backward pass.
        assert (each.peak_bytes or 0) >= 7 * report.work.parameters + (each.state_bytes or 0)  # 4 of a bfloat16 weight
        assert 0 < (each.optimizer_share or 0) < 1
