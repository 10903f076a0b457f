"""Scheduled values over time: against torch's own schedulers, the formulas of the papers, and by hand."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from pipelines.config import (
    CurveSettings,
    FactorScheduleSettings,
    PartScheduleSettings,
    RunConfig,
    ScheduleKind,
    ScheduleSettings,
)
from pipelines.errors import UsageError
from pipelines.resolve import Layer, preset_layer, resolve
from pipelines.storage import sha256_of
from pipelines.training.schedule import Scheduler, factor_at
from pipelines.training.train import train
from tests.conftest import SilentReporter

MUON_WARMUP = {"warmup_steps": 300, "initial_fraction": 0.85 / 0.95}


def test_constant_after_a_warmup_of_two_steps_starts_at_zero() -> None:
    schedule = ScheduleSettings(kind="constant", warmup_steps=2)
    assert [factor_at(schedule, step, 100) for step in range(4)] == [0.0, 0.5, 1.0, 1.0]


def test_warmup_fraction_is_a_share_of_all_steps() -> None:
    schedule = ScheduleSettings(kind="cosine", warmup_fraction=0.1, final_lr_fraction=0.02)
    assert factor_at(schedule, 120, 2400) == pytest.approx(0.5)
    assert factor_at(schedule, 240, 2400) == 1.0
    assert factor_at(schedule, 2400, 2400) == pytest.approx(0.02)


def test_cosine_agrees_with_torch() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.1)
    schedule = ScheduleSettings(kind="cosine", final_lr_fraction=0.1)
    for step in range(50):
        assert factor_at(schedule, step, 50) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_linear_falls_by_equal_amounts() -> None:
    schedule = ScheduleSettings(kind="linear", warmup_steps=4, final_lr_fraction=0.5)
    assert [factor_at(schedule, step, 8) for step in range(4, 9)] == pytest.approx([1.0, 0.875, 0.75, 0.625, 0.5])


def test_a_warmup_as_long_as_the_run_does_not_divide_by_zero() -> None:
    schedule = ScheduleSettings(kind="cosine", warmup_steps=5)
    assert factor_at(schedule, 4, 5) == pytest.approx(0.8)


def test_a_warmup_that_does_not_begin_at_zero_agrees_with_torch() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 240, total_iters=240)
    schedule = ScheduleSettings(warmup_fraction=0.1, initial_lr_fraction=1 / 240)
    for step in range(250):
        # torch multiplies 240 factors of nearly 1 in turn, each product rounded: 240 times 2^-53 and the factors' own.
        assert factor_at(schedule, step, 2400) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        scheduler.step()


SHAPES = {
    "linear": lambda n, begin, length: 1 - (n - begin) / length,
    "cosine": lambda n, begin, length: math.cos(math.pi / 2 * (n - begin) / length) ** 2,
    "sqrt": lambda n, begin, length: 1 - math.sqrt((n - begin) / length),  # arXiv 2405.18392, equation 1
    "power": lambda n, begin, length: ((length - (n - begin)) / length) ** 3,
}


@pytest.mark.parametrize("decay", SHAPES)
def test_wsd_warms_up_is_stable_and_decays_as_in_the_papers(decay: Any) -> None:
    schedule = ScheduleSettings(kind="wsd", warmup_steps=10, decay_fraction=0.25, decay=decay, decay_power=3)
    expected = [*(n / 10 for n in range(10)), *[1.0] * 65, *(SHAPES[decay](n, 75, 25) for n in range(75, 101))]
    assert [factor_at(schedule, n, 100) for n in range(101)] == pytest.approx(expected, abs=1e-15)


def test_the_decay_by_a_power_agrees_with_torch() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=40, power=1.5)
    schedule = ScheduleSettings(kind="wsd", decay_fraction=0.4, decay="power", decay_power=1.5)
    for step in range(60, 101):
        assert factor_at(schedule, step, 100) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("warmup", [1, 40])
def test_inverse_sqrt_is_that_of_vaswani_and_others_with_a_peak_of_1(warmup: int) -> None:
    schedule = ScheduleSettings(kind="inverse-sqrt", warmup_steps=warmup)
    for step in range(1, 200):
        expected = math.sqrt(warmup) * min(step**-0.5, step * warmup**-1.5)
        assert factor_at(schedule, step, 200) == pytest.approx(expected, rel=1e-12)
    assert factor_at(schedule, 0, 200) == 0.0
    without = ScheduleSettings(kind="inverse-sqrt")
    assert [factor_at(without, step, 9) for step in (0, 1, 4)] == [1.0, 1.0, 0.5]


@pytest.mark.parametrize("kind", get_args(ScheduleKind))
def test_a_schedule_has_no_jump_and_the_given_ends(kind: Any) -> None:
    schedule = ScheduleSettings(
        kind=kind, warmup_fraction=0.1, initial_lr_fraction=0.25, final_lr_fraction=0.5, decay="sqrt"
    )
    factors = [factor_at(schedule, step, 100_000) for step in range(100_001)]
    assert (factors[0], factors[10_000]) == (0.25, 1.0)
    assert factors[-1] == {"constant": 1.0, "inverse-sqrt": pytest.approx(math.sqrt(0.1))}.get(kind, 0.5)
    largest = 0.5 / math.sqrt(20_000)  # the first step of 1 − sqrt, the steepest of all
    assert max(abs(one - other) for one, other in itertools.pairwise(factors)) <= largest * (1 + 1e-12)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_wsd_that_decays_all_the_way_is_the_plain_decay(kind: Any) -> None:
    plain = ScheduleSettings(kind=kind, warmup_steps=7, final_lr_fraction=0.1)
    decaying = ScheduleSettings(kind="wsd", decay=kind, decay_fraction=1.0, warmup_steps=7, final_lr_fraction=0.1)
    assert [factor_at(plain, step, 50) for step in range(51)] == [factor_at(decaying, step, 50) for step in range(51)]


def scheduler_of(table: dict[str, Any], *groups: dict[str, Any], steps: int = 1000) -> tuple[Scheduler, list[Any]]:
    weights = [{"params": [torch.nn.Parameter(torch.zeros(2))], **group} for group in groups]
    optimizer = torch.optim.AdamW(weights, lr=1.0, betas=(0.5, 0.75))
    return Scheduler(ScheduleSettings.model_validate(table), steps, optimizer), optimizer.param_groups


def test_the_momentum_of_muon_recipes_rises_from_085_to_095_in_300_steps() -> None:
    scheduler, (group,) = scheduler_of({"momentum": MUON_WARMUP}, {"momentum": 0.95})
    found = []
    for step in (0, 150, 300, 999):
        scheduler.apply(step)
        found.append(group["momentum"])
    assert found == pytest.approx([0.85, 0.9, 0.95, 0.95])
    assert group["betas"] == (0.5, 0.75), "a group with a momentum does not use its betas as one"
    assert scheduler.keys == {"lr", "momentum"}


def test_every_group_gets_its_own_values() -> None:
    falling = {"kind": "linear", "final_fraction": 0.5}
    table = {"kind": "linear", "momentum": falling, "beta2": falling, "weight_decay": {"kind": "wsd", "decay": "sqrt"}}
    groups = ({"weight_decay": 0.5}, {"weight_decay": 0.0, "lr": 3.0}, {"beta2": 0.25})
    scheduler, found = scheduler_of(table, *groups, steps=100)
    scheduler.apply(50)
    assert [group["lr"] for group in found] == [0.5, 1.5, 0.5]
    assert [group["betas"] for group in found] == [(0.375, 0.5625), (0.375, 0.5625), (0.375, 0.75)]
    assert found[2]["beta2"] == 0.1875
    scheduler.apply(95)
    assert [group["weight_decay"] for group in found] == pytest.approx(
        [0.5 * (1 - math.sqrt(0.75)), 0.0, 0.00134], 1e-2
    )
    scheduler.apply(0)
    assert [(group["betas"], group["weight_decay"]) for group in found[:2]] == [((0.5, 0.75), 0.5), ((0.5, 0.75), 0.0)]
    assert scheduler.keys == {"lr", "betas", "beta2", "weight_decay"}


def test_the_schedule_of_a_part_overrides_what_it_names() -> None:
    table = {"kind": "wsd", "warmup_fraction": 0.1, "decay_fraction": 0.5, "parts": {
        "embedding": {"decay_fraction": 0.25}, "head": {"kind": "constant", "warmup_steps": 200},
    }}  # fmt: skip
    scheduler, groups = scheduler_of(table, {"part": "head"}, {"part": "embedding"}, {"part": "vectors"}, {})
    found = []
    for step in (50, 100, 625, 875):
        scheduler.apply(step)
        found.append([group["lr"] for group in groups])
    assert found == [[0.25, 0.5, 0.5, 0.5], [0.5, 1, 1, 1], [1, 1, 0.75, 0.75], [1, 0.5, 0.25, 0.25]]


def test_a_part_may_override_every_key_of_the_learning_rate() -> None:
    own = {*CurveSettings.model_fields, "initial_lr_fraction", "final_lr_fraction"}
    assert PartScheduleSettings.model_fields.keys() == own
    assert ScheduleSettings.model_fields.keys() == own | {"momentum", "beta2", "weight_decay", "parts"}


def test_values_are_set_in_the_groups_that_a_loaded_state_brings() -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=1.0)
    scheduler = Scheduler(ScheduleSettings(kind="linear"), 4, optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    scheduler.apply(3)
    assert optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"parts": {"head": {"kind": "linear"}}}, "schedule.parts.head: no parameter of the model is in this part"),
        ({"momentum": {}}, "schedule.momentum: the optimizer has no momentum; leave it out"),
        ({"momentum": {}, "beta2": {}}, "schedule.beta2: the optimizer has no beta2; leave it out"),
    ],
)
def test_a_schedule_without_effect_is_refused(table: dict[str, Any], message: str) -> None:
    optimizer = torch.optim.Adagrad([torch.nn.Parameter(torch.zeros(2))])
    with pytest.raises(UsageError) as error:
        Scheduler(ScheduleSettings.model_validate(table), 9, optimizer)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("curve", "highest"),
    [
        ({"kind": "linear", "final_fraction": 4.0}, "3"),
        ({"warmup_steps": 2, "initial_fraction": 4 / 3}, "1"),
    ],
)
def test_a_beta2_of_1_or_more_is_refused(curve: dict[str, Any], highest: str) -> None:
    with pytest.raises(UsageError, match=rf"^schedule\.beta2: goes up to {highest}; it must stay below 1$"):
        scheduler_of({"beta2": curve}, {})


def test_what_no_step_takes_is_not_refused_and_a_weight_decay_may_rise() -> None:
    curve = {"initial_fraction": 4.0, "final_fraction": 4.0}
    scheduler, (group,) = scheduler_of(
        {"beta2": curve, "weight_decay": {**curve, "kind": "linear"}}, {"weight_decay": 1.0}
    )
    scheduler.apply(500)
    assert (group["betas"], group["weight_decay"]) == ((0.5, 0.75), 2.5)


@pytest.mark.parametrize("optimizer", ["muon", "accasro"])
def test_a_run_with_every_schedule_resumes_bit_for_bit(
    optimizer: str, small_config: Callable[..., RunConfig], tmp_path: Path, reporter: SilentReporter
) -> None:
    curve = {"kind": "linear", "warmup_steps": 2, "initial_fraction": 0.5, "final_fraction": 0.25}
    tables = {f"schedule__{name}": curve for name in ("momentum", "beta2", "weight_decay")}
    wsd = {"schedule__kind": "wsd", "schedule__decay": "sqrt", "schedule__warmup_fraction": 0.0}
    config = small_config(optimizer__name=optimizer, **wsd, schedule__warmup_steps=1, **tables)
    rows = train(config, tmp_path / "run", reporter)
    lrs = [row["lr"] for row in rows if row["split"] == "train"]
    assert lrs == [config.optimizer.lr * factor_at(config.schedule, step, 6) for step in range(6)]
    plain = train(
        small_config(optimizer__name=optimizer, **wsd, schedule__warmup_steps=1), tmp_path / "plain", reporter
    )
    assert plain[-1]["loss"] != rows[-1]["loss"], "momentum, beta2 and weight decay have an effect"
    last = tmp_path / "run/checkpoints/step-00000006"
    digests = [sha256_of(last / name) for name in ("model.safetensors", "optimizer.safetensors")]
    shutil.rmtree(last)
    train(config, tmp_path / "run", reporter, resume=True)
    assert [sha256_of(last / name) for name in ("model.safetensors", "optimizer.safetensors")] == digests


def test_an_optimizers_table_may_hold_every_schedule() -> None:
    table = {"schedule.kind": "wsd", "schedule.momentum.warmup_steps": 300, "schedule.parts.head.decay_fraction": 0.5}
    layer = Layer("my.toml", {f"optimizers.muon.{key}": value for key, value in table.items()})
    chosen = Layer("--optimizer", {"optimizer.name": "muon"})
    schedule = resolve([preset_layer("gpt", "tiny"), layer, chosen]).schedule
    assert schedule.momentum == FactorScheduleSettings(warmup_steps=300)
    assert (schedule.kind, schedule.named_parts) == ("wsd", ("head",))
    assert resolve([preset_layer("gpt", "tiny"), layer]).schedule.momentum is None
    wrong = Layer("my.toml", {"optimizers.muon.schedule.parts.head.decay_fractoin": 0.5})
    with pytest.raises(
        UsageError, match=r"^my\.toml: optimizers\.muon\.schedule\.parts\.head\.decay_fractoin: unknown"
    ):
        resolve([preset_layer("gpt", "tiny"), wrong])
