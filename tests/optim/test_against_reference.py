"""Each optimizer against its float64 reference: shapes, ranks, missing and zero gradients, precisions, keywords."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from optim import ASGO, AccAsro, Asro

from . import reference
from .cases import (
    DESCRIPTIONS,
    SHAPES,
    Description,
    assert_follows,
    every_keyword,
    every_optimizer,
    full_rank,
    low_rank,
    matrix_optimizers,
    noise,
    parameter,
    relative_error,
    set_gradient,
    start,
)

every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
BY_NAME = {case.name: case for case in DESCRIPTIONS}


def gradients_for(case: Description, shape: tuple[int, ...], seed: int = 0) -> list[Any]:
    return full_rank(shape, seed=seed) if case.matrix else noise(shape, seed=seed)


@every_shape
@every_optimizer
def test_ten_steps_in_float64(case, shape):
    assert_follows(case, gradients_for(case, shape))


@every_shape
@every_optimizer
def test_ten_steps_in_float32(case, shape):
    assert_follows(case, gradients_for(case, shape), dtype=torch.float32, tolerance=2e-5)


@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("case", [c for c in DESCRIPTIONS if not c.matrix], ids=lambda case: case.name)
def test_elementwise_optimizers_take_any_shape(case, shape):
    assert_follows(case, noise(shape))


@pytest.mark.parametrize("moving", [True, False], ids=["moving", "fixed"])
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (8, 8)], ids=str)
@matrix_optimizers
def test_low_rank_gradients(case, shape, rank, moving):
    assert_follows(case, low_rank(shape, rank, moving=moving))


@pytest.mark.parametrize("moving", [True, False], ids=["moving", "fixed"])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (8, 8)], ids=str)
@matrix_optimizers
def test_low_rank_gradients_in_float32(case, shape, moving):
    # Shampoo's ridge of 1e-10 is below the rounding of float32, which costs it digits.
    tolerance = 2e-3 if case.name == "Shampoo" else 1e-4
    assert_follows(case, low_rank(shape, 2, moving=moving), dtype=torch.float32, tolerance=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@matrix_optimizers
def test_low_rank_gradients_leave_their_null_space_alone(case, dtype):
    """Rows and columns outside the gradient's range get no update (no weight decay here)."""
    gradients = low_rank((40, 60), 3, moving=False)
    _, _, v = np.linalg.svd(gradients[0])
    u = np.linalg.svd(gradients[0])[0]
    if case.name == "DASGO":  # scales columns: keeps the column space only
        v = v[:0]
    param = parameter(np.zeros((40, 60)), dtype)
    optimizer = case.build([param], weight_decay=0.0)
    for gradient in gradients:
        set_gradient(param, gradient)
        optimizer.step()
    w = param.detach().double().numpy()
    size = np.linalg.norm(w)
    assert size > 0.1
    assert np.linalg.norm(u[:, 3:].T @ w) < 2e-3 * size
    assert np.linalg.norm(w @ v[3:].T) < 2e-3 * size


@every_shape
@every_optimizer
def test_zero_gradient_at_the_first_step_gives_a_zero_update(case, shape):
    gradients = gradients_for(case, shape)
    assert_follows(case, [np.zeros(shape), np.zeros(shape), *gradients[:5], np.zeros(shape), gradients[5]])


@pytest.mark.parametrize("root_method", ["auto", "eigh", "polar_express", "newton_schulz", "newton"])
def test_zero_gradients_are_harmless_for_every_root_method(root_method, recwarn):
    param = parameter(start((3, 4)), torch.float32)
    before = param.detach().clone()
    optimizer = ASGO([param], root_method=root_method, weight_decay=0.0)
    for _ in range(3):
        set_gradient(param, np.zeros((3, 4)))
        optimizer.step()
    assert torch.equal(param, before)
    assert not recwarn.list


@every_optimizer
def test_gradients_that_are_always_zero_leave_weight_decay_only(case):
    optimizer, _ = assert_follows(case, [np.zeros((3, 4))] * 10, weight_decay=0.5)
    expected = start((3, 4)) * (1 - 0.1 * 0.5) ** 10
    assert relative_error(optimizer.param_groups[0]["params"][0], expected) < 1e-12


@every_optimizer
def test_steps_without_a_gradient_change_nothing(case):
    gradients = gradients_for(case, (3, 4))
    assert_follows(case, [None, *gradients[:2], None, None, *gradients[2:6], None, gradients[6]])


@pytest.mark.parametrize("precond_frequency", [1, 3])
@every_optimizer
def test_equal_shapes_with_gradients_at_different_steps_keep_their_own_count(case, precond_frequency):
    """Parameters of equal shape may be stacked: each must still follow its own reference."""
    keywords = {"precond_frequency": precond_frequency} if "precond_frequency" in case.overrides else {}
    shape, missing = (3, 4), [{}, {0, 1, 5}, {2, 3, 8}]
    params = [parameter(start(shape, seed)) for seed in range(3)]
    refers = [case.refer(param.detach().numpy(), **keywords) for param in params]
    optimizer = case.build(params, **keywords)
    gradients = [gradients_for(case, shape, seed) for seed in range(3)]
    for step in range(10):
        for param, refer, own, absent in zip(params, refers, gradients, missing, strict=True):
            set_gradient(param, None if step in absent else own[step])
            if step not in absent:
                refer.step(own[step])
        optimizer.step()
        assert max(relative_error(p, r.parameter) for p, r in zip(params, refers, strict=True)) < 1e-9


@every_keyword
def test_each_keyword_has_the_effect_of_the_formula(case, keyword):
    gradients = full_rank((4, 3)) if case.matrix else noise((4, 3))
    assert_follows(case, gradients, **{keyword: case.overrides[keyword]})


REAL_EFFECTS = [
    pytest.param(case, keyword, id=f"{case.name}-{keyword}")
    for case in DESCRIPTIONS
    for keyword in case.overrides
    # these steer the iterations, which an exact root has not: see the tests of root methods below
    if not (case.name == "ASGO" and keyword in {"root_method", "root_steps", "root_precision", "eps"})
]


@pytest.mark.parametrize(("case", "keyword"), REAL_EFFECTS)
def test_each_keyword_matters(case, keyword):
    """The reference moves with the keyword: without this, the test above could pass for a keyword nobody reads."""
    plain, changed = case.refer(start((4, 3))), case.refer(start((4, 3)), **{keyword: case.overrides[keyword]})
    for gradient in full_rank((4, 3)) if case.matrix else noise((4, 3)):
        plain.step(gradient)
        changed.step(gradient)
    assert np.abs(plain.w - changed.w).max() > 1e-6


@pytest.mark.parametrize("precond_frequency", [2, 3, 7])
@pytest.mark.parametrize("name", ["ASGO", "Shampoo"])
def test_roots_are_refreshed_at_steps_1_and_every_frequency_after(name, precond_frequency):
    assert_follows(BY_NAME[name], full_rank((3, 5)), precond_frequency=precond_frequency)


@pytest.mark.parametrize("scale_start_step", [0, 1, 2, 5])
@pytest.mark.parametrize("name", ["Asro", "AccAsro"])
def test_scale_start_step(name, scale_start_step):
    assert_follows(BY_NAME[name], noise((3, 4)), scale_start_step=scale_start_step)


@pytest.mark.parametrize("name", ["Asro", "AccAsro"])
def test_sign_ties(name):
    """Zeros in gradients and, exactly, in the first moment (decay 1/2 and binary fractions) are no sign flips."""
    values = np.array([-1.0, -0.5, 0.0, 0.0, 0.5, 1.0])
    rng = np.random.default_rng(5)
    gradients = [rng.choice(values, (20, 20)) for _ in range(12)]
    gradients[1] = -gradients[0] / 2  # m = g/2 after the first step, and exactly zero after this one
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        assert_follows(BY_NAME[name], gradients, betas=(0.5, 0.999), dtype=dtype, tolerance=tolerance)


@matrix_optimizers
def test_a_convolution_kernel_is_the_matrix_out_by_all_others(case):
    kernel, matrix = parameter(start((6, 2, 3, 2))), parameter(start((6, 2, 3, 2)).reshape(6, 12))
    optimizer = case.build([kernel, matrix])
    for gradient in full_rank((6, 12)):
        set_gradient(kernel, gradient.reshape(kernel.shape))
        set_gradient(matrix, gradient)
        optimizer.step()
    torch.testing.assert_close(kernel.detach().flatten(1), matrix.detach(), rtol=1e-12, atol=1e-12)


@matrix_optimizers
def test_a_channels_last_kernel_is_the_same_kernel(case):
    plain = parameter(start((4, 3, 2, 2)))
    strided = torch.nn.Parameter(plain.detach().to(memory_format=torch.channels_last))
    optimizer = case.build([plain, strided])
    for gradient in full_rank((4, 3, 2, 2), steps=3):
        set_gradient(plain, gradient)
        strided.grad = plain.grad.clone(memory_format=torch.channels_last)
        optimizer.step()
    torch.testing.assert_close(plain.detach(), strided.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@every_optimizer
def test_weight_decay_is_decoupled(case, weight_decay):
    assert_follows(case, gradients_for(case, (3, 4)), weight_decay=weight_decay)


@every_optimizer
def test_learning_rate_as_a_tensor(case):
    assert_follows(case, gradients_for(case, (3, 4)), lr=torch.tensor(0.125, dtype=torch.float64))


@every_optimizer
def test_learning_rate_zero_moves_the_state_but_not_the_weights(case):
    def warm_up(index: int, optimizer: torch.optim.Optimizer, refer: reference.Reference) -> None:
        refer.lr = optimizer.param_groups[0]["lr"] = 0.0 if index < 3 else 0.1

    _, refer = assert_follows(case, gradients_for(case, (3, 4)), lr=0.0, before_step=warm_up)
    assert refer.t == 10
    frozen = parameter(start((3, 4)))
    frozen.grad = torch.ones_like(frozen)
    case.build([frozen], lr=0.0).step()
    assert torch.equal(frozen, parameter(start((3, 4))))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("root_method", "root_steps"),
    [("polar_express", 14), ("newton_schulz", 30), ("newton", 10), ("cholesky", 8), ("auto", 10)],
)
def test_root_methods_agree(root_method, root_steps, dtype):
    """At moderate condition numbers every method is the exact inverse root; `auto` is one of them."""
    gradients = full_rank((5, 8))
    tolerance = 2e-6 if dtype is torch.float32 else 2e-7
    assert_follows(
        BY_NAME["ASGO"],
        gradients,
        root_method=root_method,
        root_steps=root_steps,
        root_precision="fp32",
        dtype=dtype,
        tolerance=tolerance,
    )


@pytest.mark.parametrize("root_steps", [1, 3, 9])
@pytest.mark.parametrize("root_method", ["polar_express", "newton_schulz"])
def test_root_method_and_root_steps_reach_the_iteration(root_method, root_steps):
    """A few steps do not converge, so that the update tells which were taken."""
    param, gradient, eps = parameter(np.zeros((4, 7))), noise((4, 7), 1)[0], 1e-2
    set_gradient(param, gradient)
    ASGO([param], lr=1.0, weight_decay=0.0, root_method=root_method, root_steps=root_steps, eps=eps).step()
    coefficients = {
        "polar_express": reference.polar_express(root_steps),
        "newton_schulz": [reference.NEWTON_SCHULZ] * root_steps,
    }
    root = reference.coupled_inverse_sqrt(0.2 * gradient @ gradient.T, coefficients[root_method], eps)
    assert relative_error(param, -reference.rescaled(root @ gradient, 0.2 * np.sqrt(28))) < 1e-10


@pytest.mark.parametrize("moving", [True, False], ids=["moving", "fixed"])
@pytest.mark.parametrize("root_steps", [10, 20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("root_method", ["polar_express", "newton_schulz", "newton", "cholesky"])
def test_iterative_roots_of_low_rank_gradients(root_method, root_steps, dtype, moving, recwarn):
    """V is singular: rounding errors in its null space must not grow into the update, however many steps are asked."""
    keywords = {"root_method": root_method, "root_steps": root_steps, "root_precision": "fp32"}
    assert_follows(BY_NAME["ASGO"], low_rank((24, 40), 3, moving=moving), dtype=dtype, tolerance=1e-2, **keywords)
    assert not recwarn.list


@pytest.mark.filterwarnings("ignore:the inverse root")  # the identity in its place has the right length, too
@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1e6, 1e15])
@pytest.mark.parametrize("root_method", ["eigh", "polar_express", "newton_schulz", "newton", "cholesky"])
def test_the_update_has_its_length_whatever_the_scale_of_the_gradients(root_method, scale):
    """Squares of squares leave float32 long before the gradient does; the update must not vanish there unsaid."""
    param = parameter(np.zeros((6, 8)), torch.float32)
    optimizer = ASGO([param], lr=1.0, weight_decay=0.0, root_method=root_method)
    set_gradient(param, scale * full_rank((6, 8), 1)[0])
    optimizer.step()
    assert param.square().mean().sqrt().item() == pytest.approx(0.2, rel=1e-3)


@pytest.mark.parametrize("optimizer", [Asro, AccAsro])
def test_the_scale_never_leaves_its_clamps(optimizer):
    """What is applied is the clamped scale: with `min_scale = max_scale = 1` both are Adam."""
    extra = {"increment": 0.5, "max_scale": 1.0, "total_steps": 10} if optimizer is AccAsro else {}
    ours, theirs = parameter(start((3, 4))), parameter(start((3, 4)))
    pair = optimizer([ours], lr=0.1, decrement=0.5, min_scale=1.0, **extra), torch.optim.Adam([theirs], lr=0.1)
    for gradient in noise((3, 4)):
        for param, each in zip((ours, theirs), pair, strict=True):
            set_gradient(param, gradient)
            each.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
