"""The learning rate over time, against torch's own schedulers and by hand."""

from __future__ import annotations

import pytest
import torch

from pipelines.config import ScheduleSettings
from pipelines.training.schedule import lr_factor


def test_constant_after_a_warmup_of_two_steps_starts_at_zero() -> None:
    schedule = ScheduleSettings(kind="constant", warmup_steps=2)
    assert [lr_factor(schedule, step, 100) for step in range(4)] == [0.0, 0.5, 1.0, 1.0]


def test_warmup_fraction_is_a_share_of_all_steps() -> None:
    schedule = ScheduleSettings(kind="cosine", warmup_fraction=0.1, final_lr_fraction=0.02)
    assert lr_factor(schedule, 120, 2400) == pytest.approx(0.5)
    assert lr_factor(schedule, 240, 2400) == 1.0
    assert lr_factor(schedule, 2400, 2400) == pytest.approx(0.02)


def test_cosine_agrees_with_torch() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.1)
    schedule = ScheduleSettings(kind="cosine", final_lr_fraction=0.1)
    for step in range(50):
        assert lr_factor(schedule, step, 50) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_linear_falls_by_equal_amounts() -> None:
    schedule = ScheduleSettings(kind="linear", warmup_steps=4, final_lr_fraction=0.5)
    assert [lr_factor(schedule, step, 8) for step in range(4, 9)] == pytest.approx([1.0, 0.875, 0.75, 0.625, 0.5])


def test_a_warmup_as_long_as_the_run_does_not_divide_by_zero() -> None:
    schedule = ScheduleSettings(kind="cosine", warmup_steps=5)
    assert lr_factor(schedule, 4, 5) == pytest.approx(0.8)


def test_a_warmup_that_does_not_begin_at_zero_agrees_with_torch() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 240, total_iters=240)
    schedule = ScheduleSettings(warmup_fraction=0.1, initial_lr_fraction=1 / 240)
    for step in range(250):
        # torch multiplies 240 factors of nearly 1 in turn, each product rounded: 240 times 2^-53 and the factors' own.
        assert lr_factor(schedule, step, 2400) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        scheduler.step()
