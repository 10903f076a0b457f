"""How optimizers take turns, and what becomes of the times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from pipelines.benchmarks import optimizers as module
from pipelines.benchmarks import turns
from pipelines.benchmarks.optimizers import measure
from pipelines.benchmarks.peers import Choice, parse_choice
from pipelines.benchmarks.shapes import Matrices
from pipelines.benchmarks.turns import Measurement
from pipelines.errors import AsgoError


@dataclass
class Stage:
    """A clock that stands still between the steps, and who took them."""

    now: float = 0.0
    graphs: int = 0
    steps: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, message: str) -> None:
        self.notes.append(message)

    def advance(self, what: str, done: int, total: int) -> None:
        assert 0 <= done < total


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    """The clock of the benchmark, and its reporter."""
    stage = Stage()
    monkeypatch.setattr(module.time, "perf_counter", lambda: stage.now)
    monkeypatch.setattr(turns, "compiled_graphs", lambda: stage.graphs)
    return stage


@dataclass(frozen=True)
class Actor(Choice):
    """An optimizer whose step takes `script(number of the step)` seconds."""

    stage: Stage = field(default_factory=Stage)
    script: Callable[[int], float] = lambda _: 1.0

    def build(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        actor = self

        class Acting(torch.optim.SGD):
            count = 0

            def step(self) -> None:  # type: ignore[override]
                self.count += 1
                actor.stage.steps.append(actor.name)
                actor.stage.now += actor.script(self.count)
                super().step()

        return [Acting(model.parameters(), lr=0.1)]


def actor(stage: Stage, name: str, script: Callable[[int], float] = lambda _: 1.0) -> Actor:
    return Actor(name, "test", name, {}, stage, script)


def run(stage: Stage, *actors: Choice, repeats: int = 4, budget_s: float = 100.0) -> dict[str, Measurement]:
    model = Matrices({"a": (3, 4)})
    results = measure(actors, model, repeats=repeats, budget_s=budget_s, reporter=stage)
    assert [each.name for each in results] == [each.name for each in actors]
    return {each.name: each for each in results}


def test_all_take_their_first_step_and_then_one_in_each_round(stage: Stage) -> None:
    run(stage, actor(stage, "a"), actor(stage, "b"), actor(stage, "c"), repeats=3)
    assert "".join(stage.steps) == "abc" + 3 * "abc"


def test_the_first_step_is_no_sample(stage: Stage) -> None:
    result = run(stage, actor(stage, "a", lambda count: {1: 50.0, 2: 3.0, 3: 9.0, 4: 1.0}[count]), repeats=3)["a"]
    assert result.first_step_s == 50.0
    assert list(result.samples.values()) == [3.0, 9.0, 1.0]
    assert result.median_s == 3.0


def test_one_whose_budget_is_spent_stops_and_the_others_go_on(stage: Stage) -> None:
    results = run(stage, actor(stage, "slow", lambda _: 8.0), actor(stage, "fast"), repeats=6, budget_s=20.0)
    assert len(results["slow"].samples) == 2  # 8 s, 16 s, 24 s
    assert len(results["fast"].samples) == 6
    assert stage.steps == ["slow", "fast"] * 3 + ["fast"] * 4
    assert "slow: budget used up after 2 rounds" in stage.notes


def test_a_first_step_as_long_as_the_budget_is_the_only_sample(stage: Stage) -> None:
    results = run(stage, actor(stage, "endless", lambda _: 80.0), actor(stage, "fast"), budget_s=20.0)
    endless = results["endless"]
    assert stage.steps.count("endless") == 1
    assert (endless.samples, endless.only_sample_s, endless.median_s) == ({}, 80.0, 80.0)
    assert endless.ratio_to(results["fast"]) == 80.0
    assert results["fast"].only_sample_s is None


def test_a_ratio_is_taken_round_by_round(stage: Stage) -> None:
    """The machine becomes ten times slower after two rounds: no ratio may show that."""

    def slowing(seconds: float) -> Callable[[int], float]:
        return lambda count: seconds * (1 if count <= 3 else 10)

    def leaving(count: int) -> float:
        return 45.0 if count < 4 else pytest.fail("has spent its budget")

    results = run(stage, actor(stage, "base", slowing(1.0)), actor(stage, "twice", slowing(2.0)), repeats=5)
    assert results["twice"].ratio_to(results["base"]) == 2.0
    results = run(stage, actor(stage, "base", slowing(1.0)), actor(stage, "leaves", leaving), repeats=5)
    assert results["leaves"].ratio_to(results["base"]) == 45.0
    assert results["leaves"].median_s / results["base"].median_s == 4.5  # type: ignore[operator]


def test_steps_that_compile_belong_to_the_first_and_not_to_the_budget(stage: Stage) -> None:
    def compiling(count: int) -> float:
        stage.graphs += count in (1, 3)
        return 60.0 if count in (1, 3) else 2.0

    result = run(stage, actor(stage, "compiled", compiling), repeats=4, budget_s=20.0)["compiled"]
    assert result.first_step_s == 120.0
    assert list(result.samples.values()) == [2.0, 2.0, 2.0]
    assert result.only_sample_s is None
    assert "compiled: first step 60 s with compilation" in stage.notes


@pytest.mark.parametrize("failing_step", [1, 3])
def test_one_that_raises_is_failed_and_the_others_are_measured(stage: Stage, failing_step: int) -> None:
    def breaking(count: int) -> float:
        if count == failing_step:
            raise RuntimeError("no kernel for this\nand a long trace")
        return 1.0

    results = run(stage, actor(stage, "a"), actor(stage, "broken", breaking), actor(stage, "b"), repeats=4)
    broken = results["broken"]
    assert broken.failed == "RuntimeError: no kernel for this"
    assert (broken.median_s, broken.state_bytes, broken.ratio_to(results["a"])) == (None, None, None)
    assert [len(results[name].samples) for name in "ab"] == [4, 4]
    assert "broken: failed: RuntimeError: no kernel for this" in stage.notes


def test_all_failing_is_an_error(stage: Stage) -> None:
    def breaking(count: int) -> float:
        raise RuntimeError("broken")

    with pytest.raises(AsgoError, match="no optimizer could take a step: RuntimeError: broken"):
        run(stage, actor(stage, "a", breaking))


def test_each_updates_a_copy_of_the_model_with_the_same_gradients(stage: Stage) -> None:
    model = Matrices({"a": (3, 4)})
    before = next(model.parameters()).detach().clone()
    ends = []

    class Watched(Actor):
        def build(self, model: nn.Module) -> list[torch.optim.Optimizer]:
            ends.append(next(model.parameters()))
            return super().build(model)

    choices = [Watched(name, "test", name, {}, stage) for name in "ab"]
    measure(choices, model, repeats=3, budget_s=100.0, reporter=stage)
    assert next(model.parameters()).equal(before)
    assert ends[0].equal(ends[1])
    assert not ends[0].equal(before)


def test_too_little_memory_fails_that_optimizer_with_advice(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter([10**9, 100])
    monkeypatch.setattr(module, "free_bytes", lambda _: next(free))
    results = run(stage, actor(stage, "a"), actor(stage, "b"))
    assert results["a"].failed is None
    assert "GB of memory, but" in str(results["b"].failed)
    assert "choose fewer optimizers with --optimizer" in str(results["b"].failed)


def test_free_memory_is_what_the_system_says() -> None:
    free = module.free_bytes(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50


def test_real_optimizers_are_timed_and_weighed() -> None:
    choices = [parse_choice(name) for name in ("torch.AdamW:fused=true", "accasro", "asgo")]
    results = run(Stage(), *choices, repeats=3)
    for result in results.values():
        assert result.failed is None
        assert len(result.samples) == 3
        assert result.median_s is not None
        assert 0 < result.median_s < 10
        assert result.peak_bytes is None  # a figure of GPUs
    assert results["torch.AdamW:fused=true"].state_bytes == 12 * 8 + 4


def test_what_torch_compile_captures_is_counted() -> None:
    before = turns.compiled_graphs()
    torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(3))
    assert turns.compiled_graphs() == before + 1


@pytest.mark.gpu
def test_a_gpu_adds_the_memory_of_a_step() -> None:
    model = Matrices({"a": (256, 256)}).cuda()
    (result,) = measure([parse_choice("asgo")], model, repeats=2, budget_s=20.0, reporter=Stage())
    assert result.failed is None
    assert result.peak_bytes is not None
    assert result.peak_bytes >= 4 * 256 * 256
