"""Two ways to say the same thing: how parameters are laid out and settings written does not change the numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from .cases import Description, every_optimizer, noise, parameter, set_gradient, start
from .steps import assert_identical, make_params, parameters, run, set_gradients, weights, with_fallback

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Few steps of few operations an element, which an instruction set fuses or not, and roots of small matrices: a hundred
# roundings. What is kept in lower precision is rounded to it once a step more.
RELATIVE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float64: 1e-9}
# Products of matrices that lie differently in memory add up in another order: rounding of 1e-16, and what a root of a
# nearly singular matrix makes of it, up to 1 / √1e-16 times as much.
CLOSE = {"rtol": 1e-8, "atol": 1e-11}


# --- maximize and capturable


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_optimizer
def test_maximizing_is_minimizing_with_negated_gradients(case, dtype):
    """Weight decay stays what it is; the gradients stay as they are."""
    up = case.build(with_fallback(case, make_params(dtype)), maximize=True, weight_decay=0.5)
    down = case.build(with_fallback(case, make_params(dtype)), weight_decay=0.5)
    for step in range(5):
        set_gradients(up, step)
        set_gradients(down, step)
        before = [None if param.grad is None else param.grad.clone() for param in parameters(up)]
        for param in parameters(down):
            param.grad = None if param.grad is None else -param.grad
        up.step()
        down.step()
        for param, old in zip(parameters(up), before, strict=True):
            assert param.grad is None if old is None else torch.equal(param.grad, old)
    assert_identical(up, down)


@every_optimizer
def test_one_group_may_maximize_while_another_minimizes(case):
    """Two players of one game in one optimizer."""
    params, others = make_params(), make_params()
    together = case.build([{"params": params[:2]}, {"params": params[2:], "maximize": True}])
    apart = case.build(others[:2]), case.build(others[2:], maximize=True)
    for step in range(4):
        set_gradients(together, step)
        for param, other in zip(params, others, strict=True):
            other.grad = None if param.grad is None else param.grad.clone()
        for optimizer in (together, *apart):
            optimizer.step()
    assert weights(together)
    for param, other in zip(params, others, strict=True):
        torch.testing.assert_close(param, other, rtol=1e-5, atol=1e-6)


@every_optimizer
def test_maximizing_climbs(case):
    param = parameter(start((3, 4)))
    optimizer = case.build([param], maximize=True, weight_decay=0.0)
    direction = torch.tensor(noise((3, 4), 1)[0])
    heights = []
    for _ in range(5):
        optimizer.zero_grad()
        height = (param * direction).sum()
        height.backward()
        optimizer.step()
        heights.append(height.item())
    assert heights == sorted(heights)
    assert heights[-1] > heights[0]


@pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])
@every_optimizer
def test_capturable_steps_are_the_same_steps(case, maximize):
    """What may be captured in a CUDA graph computes the same without one."""
    capturable = case.build(with_fallback(case, make_params()), capturable=True, maximize=maximize)
    plain = case.build(with_fallback(case, make_params()), maximize=maximize)
    run(capturable, range(6))
    run(plain, range(6))
    for one, other in zip(weights(capturable), weights(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


# --- The learning rate


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lr_dtype", [torch.float32, torch.float64], ids=str)
@every_optimizer
def test_a_tensor_learning_rate_does_what_the_number_does(case, lr_dtype, dtype):
    """Both rates are exact in every precision here, and `lr` times `weight_decay` is too."""
    lr = torch.tensor(0.125, dtype=lr_dtype)
    tensor = case.build(with_fallback(case, make_params(dtype)), lr=lr, weight_decay=0.5)
    number = case.build(with_fallback(case, make_params(dtype)), lr=0.125, weight_decay=0.5)
    run(tensor, range(4))
    run(number, range(4))
    for one, other in zip(weights(tensor), weights(number), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, rtol=RELATIVE[dtype], atol=RELATIVE[dtype])
    assert torch.equal(lr, torch.tensor(0.125, dtype=lr_dtype))


@every_optimizer
def test_a_tensor_learning_rate_may_be_changed_in_place(case):
    lr = torch.tensor(0.1)
    optimizer = case.build(with_fallback(case, make_params()), lr=lr)
    run(optimizer, range(2))
    at_two = [w.clone() for w in weights(optimizer)]
    lr.fill_(0.0)
    run(optimizer, range(2, 4))
    assert all(torch.equal(w, old) for w, old in zip(weights(optimizer), at_two, strict=True))
    lr.fill_(0.1)
    run(optimizer, range(4, 6))
    assert not any(torch.equal(w, old) for w, old in zip(weights(optimizer), at_two, strict=True))


@every_optimizer
def test_one_group_may_have_a_tensor_and_another_a_number(case):
    mixed, plain = make_params(torch.float64), make_params(torch.float64)
    optimizers = [
        case.build([{"params": params[:2], "lr": lr}, {"params": params[2:], "lr": 0.25}], weight_decay=0.5)
        for params, lr in ((mixed, torch.tensor(0.125)), (plain, 0.125))
    ]
    for optimizer in optimizers:
        run(optimizer, range(4))
    for one, other in zip(mixed, plain, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


# --- Layout


def strided(values: Tensor) -> Tensor:
    """Every second element of a larger tensor."""
    larger = torch.zeros(*values.shape, 2, dtype=values.dtype)
    larger[..., 0] = values
    return larger[..., 0]


def shifted(values: Tensor) -> Tensor:
    """A slice of a flat buffer that does not begin at a round address."""
    buffer = torch.zeros(values.numel() + 1, dtype=values.dtype)
    buffer[1:] = values.flatten()
    return buffer[1:].view(values.shape)


def transposed(values: Tensor) -> Tensor:
    """The first two dimensions lie the other way round in memory."""
    return values.transpose(0, 1).contiguous().transpose(0, 1)


def channels_last(values: Tensor) -> Tensor:
    """Where there are channels."""
    return values.contiguous(memory_format=torch.channels_last) if values.ndim == 4 else values


LAYOUTS: list[Callable[[Tensor], Tensor]] = [strided, shifted, transposed, channels_last]


@pytest.mark.parametrize("of_gradient", [*LAYOUTS, Tensor.contiguous], ids=lambda f: f"gradient {f.__name__}")
@pytest.mark.parametrize("of_parameter", [*LAYOUTS, Tensor.contiguous], ids=lambda f: f.__name__)
@every_optimizer
def test_the_layout_in_memory_has_no_say(case, of_parameter, of_gradient):
    plain = case.build(make_params(torch.float64))
    other = case.build([torch.nn.Parameter(of_parameter(param.detach())) for param in make_params(torch.float64)])
    for step in range(4):
        set_gradients(plain, step)
        for param, like in zip(parameters(other), parameters(plain), strict=True):
            param.grad = None if like.grad is None else of_gradient(like.grad)
        plain.step()
        other.step()
    for mine, expected in zip(weights(other), weights(plain), strict=True):
        torch.testing.assert_close(mine, expected, **CLOSE)


LARGE = [(96, 384), (8, 16, 3, 3), (1031,), (7,)]
"""Enough elements for a kernel of our own on a CPU, and sizes that fill no vector register."""


@pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@every_optimizer
def test_the_layout_of_large_parameters_has_no_say(case, layout, maximize):
    """What acts element by element, here the fallback of the matrix optimizers, runs large parameters otherwise."""
    values = [torch.tensor(start(shape), dtype=torch.float32) for shape in LARGE]
    rule = {"rule": "adam"} if case.matrix else {}
    groups = [
        [{"params": [torch.nn.Parameter(lay(value.clone())) for value in values], **rule}]
        for lay in (lambda value: layout(value) if value.ndim > 1 else value, Tensor.clone)
    ]
    other, plain = (case.build(group, weight_decay=0.1, maximize=maximize) for group in groups)
    for step in range(4):
        for index, (param, like) in enumerate(zip(parameters(other), parameters(plain), strict=True)):
            set_gradient(like, noise(tuple(like.shape), 1, 10 * step + index)[0])
            param.grad = layout(like.grad) if step % 2 and like.ndim > 1 else like.grad.clone()
        plain.step()
        other.step()
    for mine, expected, value in zip(weights(other), weights(plain), values, strict=True):
        assert not torch.equal(expected, value)
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


@every_optimizer
def test_large_and_small_parameters_take_the_same_steps(case):
    """A parameter's numbers do not depend on how many others there are."""
    rule = {"rule": "adam"} if case.matrix else {}
    alone, amidst = (torch.nn.Parameter(torch.tensor(start((37,)), dtype=torch.float32)) for _ in range(2))
    others = [torch.nn.Parameter(torch.tensor(start(shape), dtype=torch.float32)) for shape in LARGE]
    small, large = case.build([{"params": [alone], **rule}]), case.build([{"params": [amidst, *others], **rule}])
    for step in range(6):
        for index, param in enumerate([amidst, *others]):
            set_gradient(param, noise(tuple(param.shape), 1, 10 * step + index)[0])
        alone.grad = amidst.grad.clone()
        small.step()
        large.step()
    torch.testing.assert_close(alone, amidst, rtol=1e-5, atol=1e-6)


@every_optimizer
def test_a_gradient_may_be_one_number_expanded(case):
    """As `param.sum().backward()` leaves it."""
    expanded, plain = parameter(start((3, 4))), parameter(start((3, 4)))
    optimizers = case.build([expanded]), case.build([plain])
    for _ in range(3):
        expanded.grad = torch.tensor(0.5, dtype=torch.float64).expand(3, 4)
        plain.grad = torch.full((3, 4), 0.5, dtype=torch.float64)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(expanded, plain, **CLOSE)
    assert torch.equal(expanded.grad, plain.grad)


@pytest.mark.parametrize("size", [49, 9_999])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_optimizer
def test_a_step_writes_nothing_beside_its_parameters(case, dtype, size):
    """Parameters as slices of one buffer, as sharded training keeps them, with one element between them."""
    mark, rule = 7.0, {"rule": "adam"} if case.matrix and size > 1000 else {}
    buffer = torch.full((4 * (size + 1) + 1,), mark, dtype=dtype)
    starts = [1 + k * (size + 1) for k in range(4)]
    params = [torch.nn.Parameter(buffer[first : first + size].view(size, 1)) for first in starts]
    alone = [torch.nn.Parameter(param.detach().clone()) for param in params]
    sliced, plain = (case.build([{"params": each, **rule}]) for each in (params, alone))
    for step in range(3):
        for k, (param, other) in enumerate(zip(params, alone, strict=True)):
            for each in (param, other):
                set_gradient(each, noise((size, 1), 1, 10 * step + k)[0])
        sliced.step()
        plain.step()
    assert (buffer[:: size + 1] == mark).all()
    assert not any((param == mark).all() for param in params)
    for param, other in zip(params, alone, strict=True):
        torch.testing.assert_close(param, other, rtol=RELATIVE[dtype], atol=RELATIVE[dtype])


@every_optimizer
def test_an_empty_parameter_is_no_obstacle(case):
    """Pruned layers and empty shards leave such."""
    empties = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((0, 3), (3, 0), (0, 0))]
    with_empties, without = case.build([*make_params(), *empties]), case.build(make_params())
    run(with_empties, range(3))
    run(without, range(3))
    for mine, expected in zip(weights(with_empties), weights(without), strict=False):
        assert torch.equal(mine, expected)
    assert [tuple(param.shape) for param in empties] == [(0, 3), (3, 0), (0, 0)]


# --- Precision


@every_optimizer
def test_parameters_of_several_precisions_share_a_group(case):
    mixed = [parameter(start((4, 3), seed), dtype) for seed, dtype in enumerate(DTYPES * 2)]
    together = case.build(mixed)
    apart = [case.build([parameter(start((4, 3), seed), dtype)]) for seed, dtype in enumerate(DTYPES * 2)]
    for step in range(4):
        for seed, (param, alone) in enumerate(zip(mixed, apart, strict=True)):
            gradient = noise((4, 3), 1, 10 * step + seed)[0]
            set_gradient(param, gradient)
            set_gradient(parameters(alone)[0], gradient)
            alone.step()
        together.step()
    for param, alone in zip(mixed, apart, strict=True):
        assert param.dtype == parameters(alone)[0].dtype
        torch.testing.assert_close(param, parameters(alone)[0])


def in_order(case: Description, order: list[int]) -> list[Any]:
    params = make_params(torch.float64)
    optimizer = case.build([params[index] for index in order])
    for step in range(4):
        for index, param in enumerate(params):
            set_gradient(param, noise(tuple(param.shape), 1, 100 * step + index)[0])
        optimizer.step()
    return [param.detach().numpy() for param in params]


@every_optimizer
def test_the_order_of_parameters_has_no_say(case):
    for one, other in zip(in_order(case, [0, 1, 2, 3]), in_order(case, [3, 2, 0, 1]), strict=True):
        assert np.allclose(one, other, **CLOSE)
