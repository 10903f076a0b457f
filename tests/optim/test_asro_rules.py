"""The scale rules of Asro and AccAsro, one by one, on gradient sequences worked out by hand.

The decay of the first moment is 1/2, so that with gradients of ±1, ±2, ... its sign is plain to see. The scale is read
from what it does: the update is divided by Adam's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from optim import AccAsro, Asro

NO_LIMIT = {"max_scale": 100.0, "min_scale": 0.0}


def applied_scales(
    optimizer: type[torch.optim.Optimizer], gradients: Sequence[float], **keywords: object
) -> list[float]:
    """The scale of one weight at each step: its update over that of `torch.optim.Adam`, NaN where that is zero."""
    scaled, plain = (torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))
    pair = (
        optimizer([scaled], lr=1.0, betas=(0.5, 0.999), **keywords),
        torch.optim.Adam([plain], lr=1.0, betas=(0.5, 0.999)),
    )
    scales = []
    for gradient in gradients:
        before = scaled.item(), plain.item()
        for param, each in zip((scaled, plain), pair, strict=True):
            param.grad = torch.full_like(param, gradient)
            each.step()
        step = plain.item() - before[1]
        scales.append((scaled.item() - before[0]) / step if step else math.nan)
    return scales


def accasro(gradients: Sequence[float], **keywords: object) -> list[float]:
    settings = {"increment": 0.0, "decrement": 0.0, "total_steps": 100, **NO_LIMIT, **keywords}
    return applied_scales(AccAsro, gradients, **settings)


def asro(gradients: Sequence[float], **keywords: object) -> list[float]:
    return applied_scales(Asro, gradients, **{"decrement": 0.1, "min_scale": 0.0, **keywords})


def approx(values: Sequence[float]) -> object:
    return pytest.approx(values, rel=1e-9, nan_ok=True)


def growth(step: int, increment: float = 0.1, total_steps: int = 100) -> float:
    return increment * (1.01 - step / total_steps)


# --- Asro


def test_asro_starts_at_one_and_keeps_it_while_the_moment_keeps_its_sign():
    assert asro([1, 2, 1, 3]) == approx([1, 1, 1, 1])


def test_asro_decrements_at_each_flip_of_the_first_moment():
    # moments: 0.5, -0.75, 1.125, 1.06
    assert asro([1, -2, 3, 1]) == approx([1, 0.9, 0.8, 0.8])


def test_asro_ignores_a_gradient_flip_that_does_not_turn_the_moment():
    # moments: 2, 0.5, 0.75
    assert asro([4, -1, 1]) == approx([1, 1, 1])


def test_asro_never_grows_and_stops_at_min_scale():
    assert asro([1, -2, 3, -4, 5], decrement=0.3, min_scale=0.5) == approx([1, 0.7, 0.5, 0.5, 0.5])


def test_asro_clamps_at_one():
    assert asro([1, 1], decrement=0.0, min_scale=1.0) == approx([1, 1])


def test_asro_takes_no_flip_before_the_start_step_and_forgets_none_at_it():
    gradients = [1, -2, 3, -4, 5]  # a moment flip at each step from the second on
    assert asro(gradients, scale_start_step=4) == approx([1, 1, 1, 0.9, 0.8])
    assert asro(gradients, scale_start_step=0) == asro(gradients, scale_start_step=1)


def test_asro_takes_a_moment_of_exactly_zero_for_no_flip():
    # moments: 0.5, 0, -0.5, -0.75: through zero, never from sign to sign
    assert asro([1, -0.5, -1, -1, 4]) == approx([1, math.nan, 1, 1, 0.9])


# --- AccAsro


def test_accasro_grows_from_the_first_step_on_while_the_gradient_keeps_its_sign():
    first, second = 1 + growth(1), 1 + growth(1) + growth(2)
    assert accasro([1, 2], increment=0.1) == approx([first, second])


def test_accasro_growth_fades_with_the_share_of_steps_done():
    scales = accasro([1] * 10, increment=1.0, total_steps=10)
    steps = [later - earlier for earlier, later in zip([1.0, *scales], scales, strict=False)]
    assert steps == approx([1.01 - t / 10 for t in range(1, 11)])
    assert steps[-1] == pytest.approx(0.01)


def test_accasro_grows_no_more_after_the_last_step_and_never_shrinks():
    scales = accasro([1] * 8, increment=0.1, total_steps=3)
    expected = [1 + sum(growth(step, total_steps=3) for step in range(1, count + 1)) for count in (1, 2, 3)]
    assert scales == approx(expected + [expected[-1]] * 5)


def test_accasro_on_a_device_grows_as_on_the_host():
    """Where steps are counted on a GPU, the increment is a tensor."""
    optimizer = AccAsro([torch.zeros(1)], 1.0, increment=0.1, decrement=0.0, total_steps=3, **NO_LIMIT)
    for step in range(1, 9):
        expected = optimizer.scalars(optimizer.param_groups[0], float(step))["increment"]
        found = optimizer.scalars(optimizer.param_groups[0], torch.tensor(float(step)))["increment"]
        assert float(found) == pytest.approx(expected, abs=1e-8)


def test_accasro_goes_back_to_the_saved_scale_where_the_gradient_flips():
    # moments 4, 4, 2, 2.5: only the gradient flips, at steps 3 and 4, and nothing was saved since the start
    scales = accasro([8, 4, -1e-3, 3], increment=0.1)
    assert scales == approx([1 + growth(1), 1 + growth(1) + growth(2), 1, 1])


def test_accasro_does_not_grow_where_the_gradient_flips():
    assert accasro([8, -1, 1, -1], increment=0.1)[1:] == approx([1, 1, 1])


def test_accasro_decrements_then_saves_where_the_moment_flips():
    # step 2: gradient and moment flip: s = saved - 0.2 = 0.8, saved = 0.8
    # step 3: neither flips: s = 0.8 + growth; step 4: the gradient alone flips: back to the saved 0.8
    scales = accasro([1, -4, -4, 1e-3], increment=0.1, decrement=0.2)
    assert scales == approx([1 + growth(1), 0.8, 0.8 + growth(3), 0.8])


def test_accasro_restores_before_it_decrements():
    # the scale has grown; a flip of both decrements the saved scale, not the grown one
    scales = accasro([1, 1, -8], increment=0.5, decrement=0.25)
    assert scales[2] == pytest.approx(0.75)


def test_accasro_decrements_the_grown_scale_where_the_moment_flips_alone():
    # moments 2, 0.5, -3.75: step 2 restores 1; step 3 makes 1 - 0.2, saves it, and grows; step 4 restores 0.8
    scales = accasro([4, -1, -8, 1e-3], increment=0.1, decrement=0.2)
    assert scales == approx([1 + growth(1), 1, 0.8 + growth(3), 0.8])


def test_accasro_clamps_what_it_restores():
    # step 3 saves 1 - 0.8 = 0.2 and applies 0.5; step 4 restores 0.2, clamped to 0.5; step 5 grows from there
    scales = accasro([4, -1, -8, 1e-3, 1], increment=0.1, decrement=0.8, min_scale=0.5)
    assert scales[2:] == approx([0.5, 0.5, 0.5 + growth(5)])
    # without the clamp the saved value shows
    assert accasro([4, -1, -8, 1e-3], increment=0.1, decrement=0.8)[3] == pytest.approx(0.2)


def test_accasro_clamps_to_both_ends():
    assert accasro([1] * 4, increment=1.0, max_scale=2.5) == approx([1 + growth(1, 1.0), 2.5, 2.5, 2.5])
    assert accasro([1, -2, 3, -4], decrement=0.4, min_scale=0.5) == approx([1, 0.6, 0.5, 0.5])


def test_accasro_clamps_from_the_start_step_on_only():
    assert accasro([1] * 4, max_scale=0.5, min_scale=0.1, scale_start_step=3) == approx([1, 1, 0.5, 0.5])


def test_accasro_leaves_the_scale_alone_before_the_start_step():
    scales = accasro([1, -2, 3, 3], increment=0.1, decrement=0.2, scale_start_step=4)
    assert scales == approx([1, 1, 1, 1 + growth(4)])
    gradients = [1, -2, 3, 3, -1]
    early = [accasro(gradients, increment=0.1, decrement=0.2, scale_start_step=step) for step in (0, 1)]
    assert early[0] == early[1]


def test_accasro_updates_the_last_sign_before_the_start_step():
    # the sign at step 2 was -1: at step 3 it flips, so there is no growth; with the sign unset there would be
    assert accasro([9, -1, 1], increment=0.1, scale_start_step=3) == approx([1, 1, 1])
    assert accasro([9, -1, -1], increment=0.1, scale_start_step=3) == approx([1, 1, 1 + growth(3)])


def test_accasro_takes_a_gradient_of_exactly_zero_for_no_flip():
    # 8, 0, -1: from a sign to zero to the other sign; the scale grows at each step
    grown = [1 + growth(1), 1 + growth(1) + growth(2), 1 + growth(1) + growth(2) + growth(3)]
    assert accasro([8, 0, -1], increment=0.1) == approx(grown)


def test_accasro_counts_the_steps_of_each_parameter():
    """A parameter that gets its first gradient late grows as at its own first step."""
    early, late = (torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))
    settings = {"increment": 0.5, "decrement": 0.0, "total_steps": 10, **NO_LIMIT}
    optimizer = AccAsro([early, late], lr=1.0, **settings)
    for step in range(4):
        early.grad = torch.ones_like(early)
        late.grad = torch.ones_like(late) if step == 3 else None
        optimizer.step()
    # Adam's first update for a gradient of 1 is 1 / (1 + eps)
    assert -late.item() == pytest.approx(1 + growth(1, 0.5, 10), rel=1e-6)


def test_each_weight_has_its_own_scale():
    param = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = Asro([param], lr=1.0, decrement=0.5, min_scale=0.0, betas=(0.5, 0.999))
    for gradient in ([1.0, 1.0], [2.0, -2.0]):
        before = param.detach().clone()
        param.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
    steady, flipped = (param.detach() - before).tolist()
    # m̂ after two steps: 1.25 / 0.75 against -0.75 / 0.75, and the same v̂
    assert flipped / steady == pytest.approx(-(0.75 / 1.25) * 0.5)


# --- A training that is resumed for longer


def groups_of(*total_steps: int) -> AccAsro:
    settings = {"increment": 0.1, "decrement": 0.0, **NO_LIMIT}
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "total_steps": total} for total in total_steps]
    return AccAsro(groups, 1.0, total_steps=1, **settings)


def stepped(optimizer: AccAsro, steps: int) -> AccAsro:
    for _ in range(steps):
        for group in optimizer.param_groups:
            group["params"][0].grad = torch.ones(1)
        optimizer.step()
    return optimizer


def test_accasro_keeps_the_total_steps_of_its_constructor_and_says_so_once():
    saved = stepped(groups_of(10, 20, 30), 10).state_dict()
    resumed = groups_of(40, 20, 60)
    with pytest.warns(UserWarning, match=r"total_steps \(40, not 10; 60, not 30 as in the loaded state\)") as caught:
        resumed.load_state_dict(saved)
    assert len(caught) == 1
    assert [group["total_steps"] for group in resumed.param_groups] == [40, 20, 60]
    param = resumed.param_groups[0]["params"][0]
    before = resumed.state[param]["scale"].item()
    stepped(resumed, 1)
    assert resumed.state[param]["scale"].item() - before == pytest.approx(growth(11, total_steps=40), rel=1e-5)


def test_accasro_says_nothing_where_the_total_steps_agree(recwarn):
    saved = stepped(groups_of(10, 20), 2).state_dict()
    groups_of(10, 20).load_state_dict(saved)
    assert not recwarn.list
