"""What `torch.optim.AdamW` bears: meta and fake tensors, groups and parameters that are appended by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from .cases import Description, every_optimizer, matrix_optimizers, parameter, set_gradient, start
from .steps import assert_identical, make_params, run, with_fallback


@every_optimizer
def test_a_step_on_the_meta_device_makes_a_state_there(case: Description) -> None:
    params = [torch.nn.Parameter(param.to("meta")) for param in make_params()]
    optimizer = case.build(with_fallback(case, params))
    for param in params:
        param.grad = torch.empty_like(param)
    optimizer.step()
    for each in (optimizer, copy.deepcopy(optimizer)):
        assert len(each.state) == len(params)
        assert all(state["exp_avg"].is_meta for state in each.state.values())


@pytest.mark.parametrize("device", ["cpu", "cuda"])  # a fake one needs no GPU
@pytest.mark.parametrize("side", [8, 256], ids=["small", "worth a kernel"])
@every_optimizer
def test_fake_tensors_are_stepped_without_their_numbers(case: Description, side: int, device: str) -> None:
    with FakeTensorMode():
        params = [torch.nn.Parameter(torch.empty(side, side, device=device)) for _ in range(2)]
        optimizer = case.build(params)
        for _ in range(2):
            for param in params:
                param.grad = torch.empty_like(param)
            optimizer.step()
        assert all(state["exp_avg"].device.type == device for state in optimizer.state.values())


@every_optimizer
def test_a_group_that_is_appended_by_hand_takes_the_defaults(case: Description) -> None:
    added, appended = case.build(make_params()[:2]), case.build(make_params()[:2])
    group = {"params": make_params()[2:], "lr": 0.02}
    added.add_param_group({**group, "params": make_params()[2:]})
    appended.param_groups.append(group)
    for optimizer in (added, appended):
        run(optimizer, range(3))
    assert_identical(added, appended)


@pytest.mark.parametrize("is_first", [True, False])
@every_optimizer
def test_a_parameter_that_is_appended_to_a_named_group_by_hand_moves(case: Description, is_first: bool) -> None:
    optimizer = case.build([("layer.weight", parameter(start((3, 4))))])
    new = parameter(start((4, 3), 1))
    optimizer.param_groups[0]["params"].insert(0 if is_first else 1, new)
    set_gradient(new, start((4, 3), 2))
    optimizer.step()
    assert not torch.equal(new, parameter(start((4, 3), 1)))


@matrix_optimizers
def test_a_vector_that_is_appended_by_hand_is_refused_by_its_position(case: Description) -> None:
    optimizer = case.build([("layer.weight", parameter(start((3, 4))))])
    bias = parameter(start((3,)))
    optimizer.param_groups[0]["params"].append(bias)
    bias.grad = torch.ones_like(bias)
    with pytest.raises(ValueError, match=r"parameter 1 of shape \(3,\) is not a matrix"):
        optimizer.step()
