"""Every learning-rate scheduler of PyTorch drives every optimizer."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import SWALR

from .cases import (
    assert_follows,
    every_optimizer,
    full_rank,
    matrix_optimizers,
    noise,
    parameter,
    relative_error,
    set_gradient,
    start,
)
from .reference import Reference
from .steps import assert_identical, make_params, run, weights, with_fallback

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: min(1.0, step / 2)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.8),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5], gamma=0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.5, total_iters=4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.25, 1.0, 6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=12, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10, eta_min=0.01),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3, T_mult=2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.2, step_size_up=3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=12),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5),
    "SWALR": lambda o: SWALR(o, swa_lr=0.01, anneal_epochs=6),
}
every_scheduler = pytest.mark.parametrize("scheduler", SCHEDULERS)


def advance(scheduler: Any) -> None:
    """One step; a plateau is measured by a loss that never falls."""
    scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))


def train(optimizer: torch.optim.Optimizer, scheduler: Any, steps: Iterable[int]) -> None:
    for step in steps:
        run(optimizer, [step])
        advance(scheduler)


def test_the_table_has_every_scheduler_of_torch():
    classes = {name for name, value in vars(lr_scheduler).items() if inspect.isclass(value)}
    ours = {name for name in classes if name in lr_scheduler.__all__} - {LRScheduler.__name__}
    assert {*ours, "SWALR"} == set(SCHEDULERS)


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@every_scheduler
@every_optimizer
def test_a_step_takes_what_the_scheduler_wrote(case, scheduler, tensor_lr):
    """Learning rate, and momentum where it cycles, in every step as the reference with those numbers."""
    made: list[Any] = []
    rates = []

    def follow(index: int, optimizer: torch.optim.Optimizer, refer: Reference) -> None:
        if index == 0:
            made.append(SCHEDULERS[scheduler](optimizer))
        else:
            advance(made[0])
        group = optimizer.param_groups[0]
        refer.lr = float(group["lr"])
        rates.append(refer.lr)
        if "momentum" in group:
            refer.momentum = group["momentum"]
        if "betas" in group:
            refer.betas = group["betas"]

    lr = torch.tensor(0.125, dtype=torch.float64) if tensor_lr else 0.125
    gradients = full_rank((3, 4)) if case.matrix else noise((3, 4))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=r".*lr_scheduler\.step\(\)")
        optimizer, _ = assert_follows(case, gradients, lr=lr, before_step=follow)
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor) == tensor_lr
    assert len(set(rates)) > (1 if scheduler == "ConstantLR" else 2)


@every_scheduler
@every_optimizer
def test_a_scheduler_and_its_optimizer_resume_together(case, scheduler):
    """Schedulers add keys of their own to the groups; a saved state holds them."""

    def build() -> tuple[torch.optim.Optimizer, Any]:
        optimizer = case.build(with_fallback(case, make_params()))
        return optimizer, SCHEDULERS[scheduler](optimizer)

    whole, first, second = build(), build(), build()
    train(*whole, range(8))
    train(*first, range(5))
    with torch.no_grad():
        for mine, other in zip(weights(second[0]), weights(first[0]), strict=True):
            mine.copy_(other)
    for mine, other in zip(second, first, strict=True):
        mine.load_state_dict(other.state_dict())
    train(*second, range(5, 8))
    assert_identical(whole[0], second[0])
    assert [group["lr"] for group in whole[0].param_groups] == [group["lr"] for group in second[0].param_groups]


@every_optimizer
def test_each_group_follows_its_own_schedule(case):
    params = [parameter(start((3, 4), seed)) for seed in range(2)]
    optimizer = case.build([{"params": [params[0]]}, {"params": [params[1]], "lr": 0.2}])
    scheduler = lr_scheduler.LambdaLR(optimizer, [lambda step: 0.5**step, lambda step: 1 / (1 + step)])
    refers = [case.refer(param.detach().numpy().copy()) for param in params]
    for step, gradient in enumerate(full_rank((3, 4), 6)):
        for param, refer, lr in zip(params, refers, (0.1 * 0.5**step, 0.2 / (1 + step)), strict=True):
            set_gradient(param, gradient)
            refer.lr = lr
            refer.step(gradient)
        optimizer.step()
        scheduler.step()
    assert max(relative_error(p, r.parameter) for p, r in zip(params, refers, strict=True)) < 1e-9


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@matrix_optimizers
def test_the_fallback_follows_the_same_schedule(case, tensor_lr):
    """A rate of zero rests the matrices and their Adam alike."""
    lr = torch.tensor(0.1) if tensor_lr else 0.1
    optimizer = case.build(with_fallback(case, make_params()), lr=lr)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: float(step not in (2, 3)))
    for step in range(6):
        before = [w.clone() for w in weights(optimizer)]
        train(optimizer, scheduler, [3 * step + 1])  # a step at which no gradient is missing
        rests = [torch.equal(w, old) for w, old in zip(weights(optimizer), before, strict=True)]
        assert rests == [step in (2, 3)] * 4


@every_optimizer
def test_a_warm_up_that_begins_at_zero_moves_nothing_at_first(case):
    optimizer = case.build(with_fallback(case, make_params()))
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 2))
    before = [w.clone() for w in weights(optimizer)]
    train(optimizer, scheduler, [1])
    assert all(torch.equal(w, old) for w, old in zip(weights(optimizer), before, strict=True))
    train(optimizer, scheduler, [2])
    assert not any(torch.equal(w, old) for w, old in zip(weights(optimizer), before, strict=True))
