"""What every `torch.optim.Optimizer` must do in a training loop, for each of ours."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler

from .cases import (
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
from .steps import assert_identical, make_params, parameters, run, set_gradients, weights, with_fallback

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


@pytest.mark.parametrize("outside", [torch.enable_grad, torch.no_grad], ids=lambda f: f.__name__)
@every_optimizer
def test_a_closure_makes_its_own_gradients_wherever_the_step_stands(case, outside):
    """As Lightning steps: forward, backward and `zero_grad` all in the closure, which may return a number."""
    params, others = make_params(), make_params()
    stepped, looped = case.build(params), case.build(others)

    def loss_of(weights: list[Any]) -> Tensor:
        return sum((weight**2).sum() for weight in weights)

    def closure() -> float:
        stepped.zero_grad()
        loss = loss_of(params)
        loss.backward()
        return loss.item()

    for _ in range(3):
        expected = loss_of(others)
        looped.zero_grad()
        expected.backward()
        looped.step()
        with outside():
            assert stepped.step(closure=closure) == expected.item()
    assert_identical(stepped, looped)


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
def test_gradients_that_carry_a_graph_leave_none_behind(case):
    """After `backward(create_graph=True)` a gradient requires one itself."""
    param, plain = parameter(start((3, 4))), parameter(start((3, 4)))
    optimizers = case.build([param]), case.build([plain])
    for _ in range(3):
        for each, graph in ((param, True), (plain, False)):
            each.grad = torch.autograd.grad((each**3).sum(), each, create_graph=graph)[0]
        assert param.grad.requires_grad
        for optimizer in optimizers:
            optimizer.step()
    assert param.is_leaf
    assert not any(value.requires_grad for value in optimizers[0].state[param].values())
    assert_identical(*optimizers)


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
def test_zero_grad_makes_gradients_none_or_zero(case):
    """A parameter that the loss does not reach then rests, or takes a step with a gradient of zeros."""
    gradients = noise((3, 4), 5)
    for set_to_none in (True, False):
        used, unused = parameter(start((3, 4))), parameter(start((3, 4)))
        optimizer = case.build([used, unused])
        refers = [case.refer(start((3, 4))) for _ in range(2)]
        for step, gradient in enumerate(gradients):
            optimizer.zero_grad(set_to_none=set_to_none)
            assert used.grad is None if set_to_none or step == 0 else not used.grad.any()
            reached = [used, unused] if step == 0 else [used]
            sum((param * torch.tensor(gradient)).sum() for param in reached).backward()
            optimizer.step()
            refers[0].step(gradient)
            if step == 0 or not set_to_none:
                refers[1].step(gradient if step == 0 else np.zeros((3, 4)))
        for param, refer in zip((used, unused), refers, strict=True):
            assert relative_error(param, refer.parameter) < 1e-9


@every_optimizer
def test_a_parameter_may_be_frozen_and_thawed(case):
    params = make_params(torch.float64)
    optimizer = case.build(params)
    refers = [case.refer(param.detach().numpy().copy()) for param in params]
    for step in range(6):
        params[1].requires_grad_(step not in (0, 3, 4))
        optimizer.zero_grad()
        gradients = [noise(tuple(param.shape), 1, 10 * step + index)[0] for index, param in enumerate(params)]
        sum((param * torch.tensor(g)).sum() for param, g in zip(params, gradients, strict=True)).backward()
        optimizer.step()
        for param, refer, gradient in zip(params, refers, gradients, strict=True):
            if param.requires_grad:
                refer.step(gradient)
    assert max(relative_error(p, r.parameter) for p, r in zip(params, refers, strict=True)) < 1e-9


@every_optimizer
def test_a_step_inside_the_backward_pass(case):
    """One optimizer a parameter, stepped as soon as its gradient is there, so that no gradient need be kept."""
    early, late = make_params(), make_params()
    optimizers = {param: case.build([param]) for param in early}
    after = [case.build([param]) for param in late]

    def step_and_free(param: Tensor) -> None:
        optimizers[param].step()
        optimizers[param].zero_grad()

    for param in early:
        param.register_post_accumulate_grad_hook(step_and_free)
    for _ in range(3):
        for params in (early, late):
            sum((param**3).sum() for param in params).backward()
        for optimizer in after:
            optimizer.step()
            optimizer.zero_grad()
    assert all(param.grad is None for param in early)
    for optimizer, expected in zip(optimizers.values(), after, strict=True):
        assert_identical(optimizer, expected)


@every_optimizer
def test_the_gradient_scaler_skips_a_step_with_an_infinite_gradient(case):
    """All other steps are those without a scaler, to the last bit: scales are powers of two."""
    scaled, plain = (case.build(with_fallback(case, make_params())) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(6):
        set_gradients(plain, step)
        wanted = [param.grad for param in parameters(plain)]
        pairs = [(p, g) for p, g in zip(parameters(scaled), wanted, strict=True) if g is not None]
        scaled.zero_grad()
        scaler.scale(sum((param * gradient).sum() for param, gradient in pairs)).backward()
        overflows = step == 2
        if overflows:
            parameters(scaled)[3].grad[0, 0, 0, 0] = float("inf")
        else:
            plain.step()
        scaler.unscale_(scaled)
        scaler.step(scaled)
        scaler.update()
        assert scaler.get_scale() == (1024.0 if step < 2 else 512.0)
        assert_identical(scaled, plain)


@every_optimizer
def test_it_trains_under_autocast_with_a_gradient_scaler(case):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16, bias=False), torch.nn.Tanh(), torch.nn.Linear(16, 4, bias=False))
    inputs, targets = torch.randn(64, 8), torch.randn(64, 4)
    optimizer = case.build(list(model.named_parameters()), lr=0.02, weight_decay=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = torch.nn.functional.mse_loss(model(inputs), targets)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


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
def test_a_group_added_later_is_saved_and_scheduled_with_the_rest(case):
    def build(params: list[torch.nn.Parameter]) -> tuple[torch.optim.Optimizer, lr_scheduler.LRScheduler]:
        optimizer = case.build(params[:2])
        run(optimizer, range(2))
        optimizer.add_param_group({"params": params[2:], "lr": 0.02, **({"rule": "adam"} if case.matrix else {})})
        return optimizer, lr_scheduler.ExponentialLR(optimizer, 0.5)

    (whole, scheduler), (second, _) = build(make_params()), build(make_params())
    for step in (2, 3):
        run(whole, [step])
        scheduler.step()
    assert [group["lr"] for group in whole.param_groups] == pytest.approx([0.025, 0.005])
    with torch.no_grad():
        for param, weight in zip(parameters(second), weights(whole), strict=True):
            param.copy_(weight)
    second.load_state_dict(whole.state_dict())
    run(whole, [4])
    run(second, [4])
    assert_identical(whole, second)


@every_optimizer
def test_named_parameters_keep_their_names(case):
    params = make_params()
    optimizer = case.build([(f"layer.{index}", param) for index, param in enumerate(params)])
    assert optimizer.param_groups[0]["param_names"] == ["layer.0", "layer.1", "layer.2", "layer.3"]
    run(optimizer, range(2))
    other = case.build([(f"layer.{index}", param) for index, param in enumerate(make_params())])
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["param_names"] == optimizer.param_groups[0]["param_names"]


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


REFUSED = {
    "a lone parameter": (lambda a, b: a, TypeError, "iterable"),
    "an unordered set": (lambda a, b: [{"params": {a, b}}], TypeError, "ordered"),
    "no tensor": (lambda a, b: [a, 3.0], TypeError, "can only optimize Tensors"),
    "a result": (lambda a, b: [a, b * 2], ValueError, "non-leaf"),
    "names for some": (lambda a, b: [("a", a), b], ValueError, "with/without names"),
    "groups with and without names": (
        lambda a, b: [{"params": [("a", a)]}, {"params": [b]}],
        ValueError,
        "with/without names",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
@every_optimizer
def test_what_torch_refuses_is_refused(case, kind):
    make, error, words = REFUSED[kind]
    with pytest.raises(error, match=words):
        case.build(make(*make_params()[:2]))


@every_optimizer
def test_a_learning_rate_of_two_numbers_is_refused(case):
    with pytest.raises(ValueError, match="lr"):
        case.build(make_params(), lr=torch.tensor([0.1, 0.2]))


@every_optimizer
def test_a_parameter_twice_in_a_group_is_warned_of(case):
    param = parameter(start((3, 4)))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        case.build([param, param])


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
