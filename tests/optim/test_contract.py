"""What every `torch.optim.Optimizer` must do in a training loop, for each of ours."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler

from .cases import (
    Description,
    assert_follows,
    every_keyword,
    every_optimizer,
    full_rank,
    matrix_optimizers,
    noise,
    parameter,
    relative_error,
    set_gradient,
    start,
)

SHAPES = [(4, 3), (3, 4), (4, 3), (2, 3, 2, 2)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def make_params(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    return [parameter(start(shape, seed), dtype) for seed, shape in enumerate(SHAPES)]


def run(optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Steps with gradients that depend on the step and the position alone; the third parameter lacks some."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for step in steps:
        for index, param in enumerate(params):
            missing = index == 2 and step % 3 == 0
            set_gradient(param, None if missing else noise(tuple(param.shape), 1, 100 * step + index)[0])
        optimizer.step()


def weights(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param.detach() for group in optimizer.param_groups for param in group["params"]]


def assert_identical(left: torch.optim.Optimizer, right: torch.optim.Optimizer) -> None:
    """Weights and state are equal to the last bit, dtypes included."""
    for one, other in zip(weights(left), weights(right), strict=True):
        assert torch.equal(one, other)
    one_state, other_state = left.state_dict()["state"], right.state_dict()["state"]
    assert one_state.keys() == other_state.keys()
    for index, entries in one_state.items():
        assert entries.keys() == other_state[index].keys()
        for key, value in entries.items():
            assert value.dtype == other_state[index][key].dtype, key
            assert torch.equal(value, other_state[index][key]), key


def with_fallback(case: Description, params: list[Any]) -> list[dict[str, Any]]:
    """Two groups; for a matrix optimizer the second takes its fallback rule."""
    return [{"params": params[:2]}, {"params": params[2:], **({"rule": "adam"} if case.matrix else {})}]


# --- State


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_optimizer
def test_a_saved_and_loaded_state_continues_bit_for_bit(case, dtype):
    keywords = {"precond_frequency": 3} if "precond_frequency" in case.overrides else {}
    whole = case.build(make_params(dtype), **keywords)
    run(whole, range(8))

    first = case.build(make_params(dtype), **keywords)
    run(first, range(5))
    saved = copy.deepcopy(first.state_dict())
    second = case.build([torch.nn.Parameter(w.clone()) for w in weights(first)], **keywords)
    second.load_state_dict(saved)
    assert_identical(first, second)
    run(second, range(5, 8))
    assert_identical(whole, second)


@every_optimizer
def test_a_loaded_state_is_a_copy(case):
    first, second = case.build(make_params()), case.build(make_params())
    run(first, range(3))
    saved = first.state_dict()
    before = copy.deepcopy(saved["state"])
    second.load_state_dict(saved)
    run(second, range(3, 5))
    for index, entries in before.items():
        for key, value in entries.items():
            assert torch.equal(value, first.state_dict()["state"][index][key]), key


@every_optimizer
def test_a_state_with_groups_and_their_settings_round_trips(case):
    whole = case.build(with_fallback(case, make_params()))
    run(whole, range(5))
    first = case.build(with_fallback(case, make_params()))
    run(first, range(3))
    second = case.build(with_fallback(case, [torch.nn.Parameter(w.clone()) for w in weights(first)]), lr=9.0)
    second.load_state_dict(first.state_dict())
    assert [group["lr"] for group in second.param_groups] == [0.1, 0.1]
    run(second, range(3, 5))
    assert_identical(whole, second)


@every_optimizer
def test_a_state_of_another_number_of_parameters_is_refused(case):
    first, second = case.build(make_params()), case.build(make_params()[:2])
    run(first, range(1))
    with pytest.raises(ValueError, match="parameter group"):
        second.load_state_dict(first.state_dict())


@every_optimizer
def test_state_is_made_at_the_first_step_of_a_parameter(case):
    optimizer = case.build(make_params())
    assert not optimizer.state_dict()["state"]
    run(optimizer, range(1))  # the third parameter has no gradient at step 0
    assert set(optimizer.state_dict()["state"]) == {0, 1, 3}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_optimizer
def test_low_precision_parameters_have_a_float32_state(case, dtype):
    optimizer = case.build(with_fallback(case, make_params(dtype)))
    run(optimizer, range(2))
    dtypes = {value.dtype for entries in optimizer.state.values() for value in entries.values()}
    # of the last gradient AccAsro keeps the sign alone, in a byte
    assert dtypes == ({torch.float32, torch.int8} if case.name == "AccAsro" else {torch.float32})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_optimizer
def test_a_low_precision_parameter_moves_by_the_float32_update_rounded_once(case, dtype):
    low, full = parameter(start((4, 3)), dtype), parameter(start((4, 3)), torch.float32)
    with torch.no_grad():
        full.copy_(low)
    pair = case.build([low], weight_decay=0.1), case.build([full], weight_decay=0.1)
    set_gradient(low, noise((4, 3), 1)[0])
    full.grad = low.grad.float()
    for optimizer in pair:
        optimizer.step()
    assert torch.equal(low, full.to(dtype))


@every_optimizer
def test_steps_are_counted_exactly_under_a_low_precision_default(case):
    """bfloat16 cannot count beyond 256."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        optimizer = case.build(with_fallback(case, make_params(torch.bfloat16)))
        run(optimizer, range(1))
    finally:
        torch.set_default_dtype(torch.float32)
    counts = [entries["step"] for entries in optimizer.state.values() if "step" in entries]
    assert counts
    assert all(count.dtype in (torch.float32, torch.int64) for count in counts)


@every_optimizer
def test_a_deep_copy_continues_the_same_and_on_its_own(case):
    original = case.build(with_fallback(case, make_params()))
    run(original, range(3))
    clone = copy.deepcopy(original)
    assert_identical(original, clone)
    at_copy = [w.clone() for w in weights(original)]
    run(clone, range(3, 6))
    assert all(torch.equal(w, old) for w, old in zip(weights(original), at_copy, strict=True))
    run(original, range(3, 6))
    assert_identical(original, clone)


# --- The loop


@every_optimizer
def test_a_closure_is_called_with_gradients_on_and_its_loss_returned(case):
    param = parameter(np.ones((2, 2)))
    optimizer = case.build([param])
    calls = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        calls.append(loss)
        return loss

    assert optimizer.step(closure) is calls[0]
    assert len(calls) == 1
    assert not torch.equal(param, torch.ones_like(param))


@every_optimizer
def test_a_step_without_a_closure_returns_nothing_and_records_no_graph(case):
    param = parameter(np.ones((2, 2)))
    param.grad = torch.ones_like(param)
    optimizer = case.build([param])
    assert optimizer.step() is None
    assert param.is_leaf
    assert param.requires_grad
    assert not any(v.requires_grad for s in optimizer.state.values() for v in s.values())


@every_optimizer
def test_a_step_leaves_the_gradients_as_they_are(case):
    optimizer = case.build(with_fallback(case, make_params()))
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for param in params:
        param.grad = torch.randn_like(param, generator=None)
    before = [param.grad.clone() for param in params]
    optimizer.step()
    assert all(torch.equal(param.grad, grad) for param, grad in zip(params, before, strict=True))


@every_optimizer
def test_parameters_without_a_gradient_are_untouched(case):
    moving, resting = parameter(start((3, 4))), parameter(start((3, 4)))
    optimizer = case.build([moving, resting], weight_decay=0.5)
    for gradient in noise((3, 4), 3):
        set_gradient(moving, gradient)
        optimizer.step()
    assert torch.equal(resting, parameter(start((3, 4))))
    assert resting not in optimizer.state
    assert case.build([resting]).step() is None  # nobody has a gradient


@every_optimizer
def test_it_minimizes_a_quadratic(case):
    target = torch.tensor(noise((4, 6), 1)[0])
    param = parameter(np.zeros((4, 6)))
    optimizer = case.build([param], weight_decay=0.0)
    schedule = lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 150)
    for _ in range(150):
        optimizer.zero_grad()
        loss = ((param - target) ** 2).sum()
        loss.backward()
        optimizer.step()
        schedule.step()
    assert loss < 0.01 * (target**2).sum()


# --- Groups


@every_keyword
def test_a_group_may_override_each_keyword(case, keyword):
    """A group with its own value does what a separate optimizer with that value does."""
    value = case.overrides[keyword]
    together, alone = make_params(torch.float64), make_params(torch.float64)
    optimizer = case.build([{"params": together[:2]}, {"params": together[2:], keyword: value}])
    separate = case.build(alone[:2]), case.build(alone[2:], **{keyword: value})
    for seed in range(6):
        for mine, other in zip(together, alone, strict=True):
            set_gradient(mine, noise(tuple(mine.shape), 1, seed)[0])
            set_gradient(other, noise(tuple(mine.shape), 1, seed)[0])
        for each in (optimizer, *separate):
            each.step()
    for mine, other in zip(together, alone, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


@every_optimizer
def test_a_group_added_later_starts_fresh(case):
    old, new = parameter(start((3, 4), 1)), parameter(start((3, 4), 2))
    optimizer = case.build([old])
    refers = [case.refer(start((3, 4), 1)), case.refer(start((3, 4), 2), lr=0.02)]
    gradients = full_rank((3, 4))
    for step, gradient in enumerate(gradients):
        if step == 4:
            optimizer.add_param_group({"params": [new], "lr": 0.02})
        for param, refer in zip((old, new), refers, strict=True):
            if param is old or step >= 4:
                set_gradient(param, gradient)
                refer.step(gradient)
        optimizer.step()
    assert relative_error(old, refers[0].parameter) < 1e-9
    assert relative_error(new, refers[1].parameter) < 1e-9


@every_optimizer
def test_named_parameters_keep_their_names(case):
    params = make_params()
    optimizer = case.build([(f"layer.{index}", param) for index, param in enumerate(params)])
    assert optimizer.param_groups[0]["param_names"] == ["layer.0", "layer.1", "layer.2", "layer.3"]
    run(optimizer, range(2))
    other = case.build([(f"layer.{index}", param) for index, param in enumerate(make_params())])
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["param_names"] == optimizer.param_groups[0]["param_names"]


# --- Schedulers

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: min(1.0, step / 2)),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10, eta_min=0.01),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=12),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.2, step_size_up=3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5),
}


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@every_optimizer
def test_learning_rate_schedulers(case, scheduler, tensor_lr):
    """What a scheduler writes into a group is what the next step uses: learning rate, and momentum where it cycles."""
    made: list[Any] = []
    rates = []

    def follow(index: int, optimizer: torch.optim.Optimizer, refer: Any) -> None:
        if index == 0:
            made.append(SCHEDULERS[scheduler](optimizer))
        else:
            made[0].step(*([1.0] if scheduler == "ReduceLROnPlateau" else []))
        group = optimizer.param_groups[0]
        refer.lr = float(group["lr"])
        rates.append(refer.lr)
        if "momentum" in group:
            refer.momentum = group["momentum"]
        if "betas" in group:
            refer.betas = group["betas"]

    lr = torch.tensor(0.125, dtype=torch.float64) if tensor_lr else 0.125
    gradients = full_rank((3, 4)) if case.matrix else noise((3, 4))
    assert_follows(case, gradients, lr=lr, before_step=follow)
    assert len(set(rates)) > 2


@every_optimizer
def test_a_scheduler_and_its_optimizer_resume_together(case):
    """Schedulers add keys of their own to the groups; a saved state holds them."""

    def build() -> tuple[torch.optim.Optimizer, Any]:
        optimizer = case.build(make_params())
        return optimizer, lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=10)

    def train(pair: tuple[torch.optim.Optimizer, Any], steps: range) -> None:
        for step in steps:
            run(pair[0], range(step, step + 1))
            pair[1].step()

    whole, first, second = build(), build(), build()
    train(whole, range(8))
    train(first, range(5))
    with torch.no_grad():
        for mine, other in zip(weights(second[0]), weights(first[0]), strict=True):
            mine.copy_(other)
    for mine, other in zip(second, first, strict=True):
        mine.load_state_dict(other.state_dict())
    train(second, range(5, 8))
    assert_identical(whole[0], second[0])


# --- Refused parameters and gradients


@every_optimizer
def test_a_sparse_gradient_is_refused_by_name_before_anything_moves(case):
    dense, table = parameter(start((3, 4))), torch.nn.Embedding(5, 4, sparse=True, dtype=torch.float64)
    optimizer = case.build([{"params": [("body.weight", dense)]}, {"params": [("emb.weight", table.weight)]}])
    before = [w.clone() for w in weights(optimizer)]
    dense.grad = torch.ones_like(dense)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises((ValueError, TypeError, RuntimeError), match=r"sparse.*emb\.weight"):
        optimizer.step()
    assert all(torch.equal(w, old) for w, old in zip(weights(optimizer), before, strict=True))


@matrix_optimizers
def test_the_fallback_refuses_a_sparse_gradient_too(case):
    table = torch.nn.Embedding(5, 4, sparse=True)
    optimizer = case.build([{"params": [("emb.weight", table.weight)], "rule": "adam"}])
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises((ValueError, TypeError, RuntimeError), match=r"sparse.*emb\.weight"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@every_optimizer
def test_a_complex_parameter_is_refused_by_name(case, dtype):
    param = torch.nn.Parameter(torch.ones(2, 2, dtype=dtype))
    with pytest.raises((ValueError, TypeError), match=r"spectrum\.weight.*complex"):
        case.build([("spectrum.weight", param)])


@pytest.mark.parametrize("shape", [(3,), ()], ids=str)
@matrix_optimizers
def test_a_parameter_that_is_no_matrix_is_refused_by_name(case, shape):
    bias = parameter(start(shape))
    with pytest.raises(ValueError, match=r"layer\.bias"):
        case.build([("layer.weight", parameter(start((3, 4)))), ("layer.bias", bias)])
    with pytest.raises(ValueError, match=r"parameter 1\b"):
        case.build([parameter(start((3, 4))), bias])
    optimizer = case.build([("layer.weight", parameter(start((3, 4))))])
    with pytest.raises(ValueError, match=r"layer\.bias"):
        optimizer.add_param_group({"params": [("layer.bias", bias)]})
    assert len(optimizer.param_groups) == 1
