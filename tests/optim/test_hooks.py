"""The hooks around a step, around `state_dict` and around `load_state_dict` are called as PyTorch documents them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .cases import every_optimizer, parameter, start
from .steps import assert_identical, copies, make_params, parameters, run, set_gradients, weights, with_fallback

# --- Around a step


@every_optimizer
def test_step_hooks_see_the_weights_before_and_after_each_step_until_removed(case):
    optimizer = case.build(make_params())
    seen: list[tuple[str, torch.Tensor]] = []

    def record(when: str) -> Any:
        return lambda hooked, args, kwargs: seen.append((when, weights(hooked)[0].clone()))

    handles = optimizer.register_step_pre_hook(record("before")), optimizer.register_step_post_hook(record("after"))
    before = weights(optimizer)[0].clone()
    run(optimizer, range(1))
    middle = weights(optimizer)[0].clone()
    run(optimizer, range(1, 2))
    after = weights(optimizer)[0].clone()
    for handle in handles:
        handle.remove()
    run(optimizer, range(2, 3))
    assert [when for when, _ in seen] == ["before", "after"] * 2
    for (_, weight), expected in zip(seen, [before, middle, middle, after], strict=True):
        assert torch.equal(weight, expected)
    assert not torch.equal(before, middle)


@every_optimizer
def test_hooks_for_all_optimizers_come_first_and_last(case):
    optimizer = case.build(make_params())
    calls: list[str] = []

    def record(name: str) -> Any:
        return lambda hooked, args, kwargs: calls.append(name)

    handles = [
        register_optimizer_step_pre_hook(record("every before")),
        register_optimizer_step_post_hook(record("every after")),
        optimizer.register_step_pre_hook(record("own before")),
        optimizer.register_step_post_hook(record("own after")),
    ]
    try:
        run(optimizer, range(1))
    finally:
        for handle in handles:
            handle.remove()
    run(optimizer, range(1, 2))
    assert calls == ["every before", "own before", "own after", "every after"]


@every_optimizer
def test_a_step_hook_may_replace_the_closure(case):
    param = parameter(start((3, 4)))
    optimizer = case.build([param])

    def replacement() -> str:
        param.grad = torch.ones_like(param)
        return "replaced"

    optimizer.register_step_pre_hook(lambda hooked, args, kwargs: ((hooked, replacement), {}))
    assert optimizer.step(lambda: "given") == "replaced"
    assert optimizer.step(closure=lambda: "given") == "replaced"


@every_optimizer
def test_what_a_step_hook_does_to_gradients_and_settings_holds_for_that_step(case):
    """Clipping and schedules are done so."""
    hooked, plain = case.build(make_params()), case.build(make_params(), lr=0.02)

    def change(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        optimizer.param_groups[0]["lr"] = 0.02
        clip_to_half(optimizer)

    def clip_to_half(optimizer: torch.optim.Optimizer) -> None:
        for param in parameters(optimizer):
            if param.grad is not None:
                param.grad = param.grad.clamp(-0.5, 0.5)

    hooked.register_step_pre_hook(change)
    for step in range(4):
        run(hooked, [step])
        set_gradients(plain, step)
        clip_to_half(plain)
        plain.step()
    assert_identical(hooked, plain)


# --- Around the state dict


@every_optimizer
def test_state_dict_hooks_run_before_and_on_the_result(case):
    optimizer = case.build(make_params())
    run(optimizer, range(2))
    calls: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda hooked: calls.append("before"))
    optimizer.register_state_dict_pre_hook(lambda hooked: calls.append("first"), prepend=True)

    def add(hooked: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        state_dict["note"] = 1

    def replace(hooked: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {**state_dict, "note": state_dict["note"] + 1}

    optimizer.register_state_dict_post_hook(add)
    optimizer.register_state_dict_post_hook(replace)
    assert optimizer.state_dict()["note"] == 2
    assert calls == ["first", "before"]


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "returned"])
@every_optimizer
def test_what_a_hook_makes_of_a_state_is_what_is_loaded(case, in_place):
    """PyTorch's way to load a state whose parameters were renamed, cut or put into another order."""
    first = case.build(make_params())
    run(first, range(3))
    second = case.build(copies(first))

    def double(entries: dict[str, Any]) -> dict[str, Any]:
        return {key: value if key == "step" else 2 * value for key, value in entries.items()}

    def rewrite(hooked: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        state = {index: double(entries) for index, entries in state_dict["state"].items()}
        if not in_place:
            return {**state_dict, "state": state}
        state_dict["state"] = state
        return None

    second.register_load_state_dict_pre_hook(rewrite)
    saved = first.state_dict()
    kept = copy.deepcopy(saved)
    second.load_state_dict(saved)
    for index, entries in kept["state"].items():
        for key, value in double(entries).items():
            assert torch.equal(second.state_dict()["state"][index][key], value), key
            assert torch.equal(saved["state"][index][key], entries[key]), "the caller's own state was changed"


@every_optimizer
def test_a_hook_may_load_fewer_parameters_than_were_saved(case):
    """The hook drops the last parameter, which the new optimizer does not have."""
    first = case.build(make_params())
    run(first, range(3))
    second = case.build(copies(first)[:3])

    def drop(hooked: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        group = state_dict["param_groups"][0]
        state = {index: entries for index, entries in state_dict["state"].items() if index < 3}
        return {"state": state, "param_groups": [{**group, "params": [0, 1, 2]}]}

    second.register_load_state_dict_pre_hook(drop)
    second.load_state_dict(first.state_dict())
    run(first, range(3, 6))
    run(second, range(3, 6))
    assert all(torch.equal(mine, other) for mine, other in zip(weights(second), weights(first)[:3], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_optimizer
def test_a_hook_after_loading_sees_and_keeps_the_whole_state(case, dtype):
    """With its dtypes: what the hook writes into the state is what the next step reads."""
    first = case.build(with_fallback(case, make_params(dtype)))
    run(first, range(3))
    second = case.build(with_fallback(case, copies(first)))
    expected = copy.deepcopy(first.state_dict()["state"])
    calls: list[str] = []

    def tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
        return [value for entries in optimizer.state.values() for value in entries.values()]

    def check(hooked: torch.optim.Optimizer) -> None:
        calls.append("after")
        for index, entries in hooked.state_dict()["state"].items():
            for key, value in entries.items():
                assert value.dtype == expected[index][key].dtype, key
                assert torch.equal(value, expected[index][key]), key
        for value in tensors(hooked):
            value.zero_()

    second.register_load_state_dict_post_hook(check)
    second.load_state_dict(first.state_dict())
    assert calls == ["after"]
    assert not any(value.any() for value in tensors(second))
