"""What is saved continues as if nothing had happened: state dicts, files, deep copies."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from .cases import DESCRIPTIONS, every_optimizer, noise, parameter, set_gradient, start
from .steps import (
    assert_identical,
    assert_states_identical,
    copies,
    make_params,
    run,
    weights,
    with_fallback,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LOW_PRECISION = [torch.bfloat16, torch.float16]
SCHEDULED = [case for case in DESCRIPTIONS if "precond_frequency" in case.overrides]


# --- Saving and loading


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_optimizer
def test_a_saved_and_loaded_state_continues_bit_for_bit(case, dtype):
    keywords = {"precond_frequency": 3} if "precond_frequency" in case.overrides else {}
    whole = case.build(make_params(dtype), **keywords)
    run(whole, range(8))

    first = case.build(make_params(dtype), **keywords)
    run(first, range(5))
    saved = copy.deepcopy(first.state_dict())
    second = case.build(copies(first), **keywords)
    second.load_state_dict(saved)
    assert_identical(first, second)
    run(second, range(5, 8))
    assert_identical(whole, second)
    assert second.state_dict()["param_groups"] == whole.state_dict()["param_groups"]


@pytest.mark.parametrize("saved_after", [0, 1, 4])
@every_optimizer
def test_a_state_read_from_a_file_continues_bit_for_bit(case, saved_after, tmp_path: Path):
    """With `weights_only`, the safe way to read; before the first step, and before the third parameter's first."""
    whole = case.build(with_fallback(case, make_params()))
    run(whole, range(6))

    first = case.build(with_fallback(case, make_params()))
    run(first, range(saved_after))
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")
    second = case.build(with_fallback(case, copies(first)))
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert_identical(first, second)
    run(second, range(saved_after, 6))
    assert_identical(whole, second)


@every_optimizer
def test_a_loaded_state_is_a_copy(case):
    first, second = case.build(make_params()), case.build(make_params())
    run(first, range(3))
    saved = first.state_dict()
    before = copy.deepcopy(saved)
    second.load_state_dict(saved)
    run(second, range(3, 5))
    assert_states_identical(before, first.state_dict())


@every_optimizer
def test_asking_for_the_state_changes_nothing(case):
    asked, silent = case.build(make_params()), case.build(make_params())
    for step in range(4):
        run(asked, [step])
        run(silent, [step])
        before, again = copy.deepcopy(asked.state_dict()), asked.state_dict()
        assert_states_identical(before, again)
        assert before["param_groups"] == again["param_groups"]
    assert_identical(asked, silent)


@every_optimizer
def test_a_state_with_groups_and_their_settings_round_trips(case):
    whole = case.build(with_fallback(case, make_params()))
    run(whole, range(5))
    first = case.build(with_fallback(case, make_params()))
    run(first, range(3))
    second = case.build(with_fallback(case, copies(first)), lr=9.0)
    second.load_state_dict(first.state_dict())
    assert [group["lr"] for group in second.param_groups] == [0.1, 0.1]
    run(second, range(3, 5))
    assert_identical(whole, second)


@every_optimizer
def test_a_tensor_learning_rate_is_loaded_as_a_tensor_of_its_own(case):
    first = case.build(make_params(), lr=torch.tensor(0.125))
    second = case.build(make_params(), lr=torch.tensor(0.5))
    run(first, range(2))
    second.load_state_dict(first.state_dict())
    first.param_groups[0]["lr"].fill_(7.0)
    assert torch.equal(second.param_groups[0]["lr"], torch.tensor(0.125))


@every_optimizer
def test_a_state_of_another_number_of_parameters_is_refused(case):
    first, second = case.build(make_params()), case.build(make_params()[:2])
    run(first, range(1))
    with pytest.raises(ValueError, match="parameter group"):
        second.load_state_dict(first.state_dict())


@every_optimizer
def test_a_state_of_before_a_keyword_existed_takes_its_default(case):
    """`maximize` and `capturable` came later than the first checkpoints."""
    whole = case.build(with_fallback(case, make_params()))
    run(whole, range(5))
    first = case.build(with_fallback(case, make_params()))
    run(first, range(3))
    saved = first.state_dict()
    for group in saved["param_groups"]:
        for key in ("maximize", "capturable", "row_blocks"):
            group.pop(key, None)
    second = case.build(with_fallback(case, copies(first)))
    second.load_state_dict(saved)
    run(second, range(3, 5))
    assert_identical(whole, second)


@every_optimizer
def test_a_count_of_steps_that_was_saved_as_a_number_is_taken(case):
    whole = case.build(with_fallback(case, make_params()))
    run(whole, range(5))
    first = case.build(with_fallback(case, make_params()))
    run(first, range(3))
    saved = copy.deepcopy(first.state_dict())
    counting = [entries for entries in saved["state"].values() if "step" in entries]
    assert counting
    for entries in counting:
        entries["step"] = float(entries["step"])
    second = case.build(with_fallback(case, copies(first)))
    second.load_state_dict(saved)
    run(second, range(3, 5))
    assert_identical(whole, second)


@pytest.mark.parametrize("named_after", [True, False], ids=["into named", "into unnamed"])
@every_optimizer
def test_a_state_loads_with_or_without_names(case, named_after):
    def build(params: list[Any], named: bool) -> torch.optim.Optimizer:
        return case.build([(f"layer.{index}", param) for index, param in enumerate(params)] if named else params)

    first = build(make_params(), not named_after)
    run(first, range(3))
    second = build(copies(first), named_after)
    second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["param_names"] == ["layer.0", "layer.1", "layer.2", "layer.3"]
    run(first, range(3, 5))
    run(second, range(3, 5))
    assert_identical(first, second)


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@every_optimizer
def test_distributed_checkpoints_find_and_restore_the_state_by_name(case, tensor_lr):
    """`torch.distributed.checkpoint` makes missing state by a step with zero gradients and a rate of zero."""
    from torch.distributed.checkpoint import state_dict as by_name  # two seconds, for this test alone

    def build() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 4)).double()
        matrices = [param for param in model.parameters() if param.ndim == 2]
        others = [param for param in model.parameters() if param.ndim < 2]
        groups = with_fallback(case, [*matrices, *others])
        return model, case.build(groups, lr=torch.tensor(0.1, dtype=torch.float64) if tensor_lr else 0.1)

    (model, first), (other, second) = build(), build()
    run(first, range(1, 4))
    saved = by_name.get_optimizer_state_dict(model, first)
    assert set(saved["state"]) == {"0.weight", "1.weight", "0.bias", "1.bias"}
    other.load_state_dict(model.state_dict())
    by_name.set_optimizer_state_dict(other, second, optim_state_dict=saved)
    assert_identical(first, second)
    run(first, range(4, 6))
    run(second, range(4, 6))
    assert_identical(first, second)


@every_optimizer
def test_a_state_loads_into_parameters_that_lie_otherwise_in_memory(case):
    first = case.build(make_params(torch.float64))
    run(first, range(3))
    transposed = [weight.transpose(0, 1).contiguous().transpose(0, 1) for weight in weights(first)]
    second = case.build([torch.nn.Parameter(weight) for weight in transposed])
    second.load_state_dict(first.state_dict())
    run(first, range(3, 6))
    run(second, range(3, 6))
    for mine, expected in zip(weights(second), weights(first), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-8, atol=1e-11)


# --- What the state is


@every_optimizer
def test_state_is_made_at_the_first_step_of_a_parameter(case):
    optimizer = case.build(make_params())
    assert not optimizer.state_dict()["state"]
    run(optimizer, range(1))  # the third parameter has no gradient at step 0
    assert set(optimizer.state_dict()["state"]) == {0, 1, 3}


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@every_optimizer
def test_low_precision_parameters_have_a_float32_state(case, dtype):
    optimizer = case.build(with_fallback(case, make_params(dtype)))
    run(optimizer, range(2))
    dtypes = {value.dtype for entries in optimizer.state.values() for value in entries.values()}
    # of the last gradient AccAsro keeps the sign alone, in a byte
    assert dtypes == ({torch.float32, torch.int8} if case.name == "AccAsro" else {torch.float32})


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
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


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
@every_optimizer
def test_the_default_dtype_has_no_say(case, default):
    optimizers = []
    for dtype in (torch.float32, default):
        torch.set_default_dtype(dtype)
        try:
            optimizers.append(case.build(with_fallback(case, make_params())))
            run(optimizers[-1], range(3))
        finally:
            torch.set_default_dtype(torch.float32)
    assert_identical(*optimizers)


# --- Deep copies


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


@every_optimizer
def test_a_deep_copy_has_every_public_attribute(case):
    original = case.build(with_fallback(case, make_params()), lr=torch.tensor(0.125))
    run(original, range(3))
    clone = copy.deepcopy(original)

    def public(optimizer: torch.optim.Optimizer) -> set[str]:
        return {name for name in vars(optimizer) if not name.startswith("_")}

    assert public(clone) == public(original)
    assert {key: clone.defaults[key] for key in original.defaults} == original.defaults
    for copied, group in zip(clone.param_groups, original.param_groups, strict=True):
        assert copied.keys() == group.keys()
        assert copied["lr"] is not group["lr"]
        assert all(copied[key] == group[key] for key in group if key != "params")


@every_optimizer
def test_a_deep_copy_with_its_model_and_scheduler_trains_that_model(case):
    model = torch.nn.ParameterList(make_params())
    optimizer = case.build(list(model.parameters()))
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    run(optimizer, range(2))
    scheduler.step()
    other_model, other, other_scheduler = copy.deepcopy((model, optimizer, scheduler))
    before = [param.detach().clone() for param in model]
    for step in (2, 3):
        run(other, [step])
        other_scheduler.step()
    assert all(torch.equal(param, old) for param, old in zip(model, before, strict=True))
    assert not any(torch.equal(param, old) for param, old in zip(other_model, before, strict=True))
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.05)
    assert float(other.param_groups[0]["lr"]) == pytest.approx(0.0125)


@every_optimizer
def test_a_deep_copy_before_the_first_step_starts_fresh(case):
    original = case.build(make_params())
    clone = copy.deepcopy(original)
    run(original, range(3))
    run(clone, range(3))
    assert_identical(original, clone)


@pytest.mark.parametrize("case", SCHEDULED, ids=lambda case: case.name)
def test_a_deep_copy_refreshes_its_roots_at_the_same_steps(case):
    original = case.build(make_params(), precond_frequency=3)
    run(original, range(2))
    clone = copy.deepcopy(original)
    run(original, range(2, 8))
    run(clone, range(2, 8))
    assert_identical(original, clone)
