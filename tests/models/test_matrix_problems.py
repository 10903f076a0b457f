"""The matrix problems: losses and gradients in plain numpy, in another algebraic form."""

import numpy as np
import numpy.typing as npt
import pytest
import torch

from models.matrix_problems import PROBLEMS, Instance

Array = npt.NDArray[np.float64]


def loss_and_gradients(instance: Instance, *places: Array) -> tuple[float, list[Array]]:
    tensors = [torch.from_numpy(place).requires_grad_() for place in places]
    loss = instance.loss(tensors)
    return loss.item(), [gradient.numpy() for gradient in torch.autograd.grad(loss, tensors)]


def hessian(instance: Instance) -> Array:
    """Over the columns of W, one below the other: a quadratic's gradients at the unit matrices less that at 0."""
    units = torch.zeros(961, 40, 24, dtype=torch.float64)
    units[1:] = torch.eye(960, dtype=torch.float64).view(960, 40, 24)
    places = units.mT.requires_grad_()
    (gradients,) = torch.autograd.grad(instance.loss([places]).sum(), places)
    rows = gradients.mT.reshape(961, 960).numpy()
    return np.asarray(rows[1:] - rows[0], dtype=np.float64)


def test_the_quadratics_hessian_is_a_kronecker_product_of_condition_1000() -> None:
    full = hessian(PROBLEMS["kronecker_quadratic"].make(0))
    m, n = 24, 40
    # Van Loan and Pitsianis: B ⊗ A, with its blocks as rows, is the outer product of B's and A's entries: of rank 1.
    blocks = full.reshape(n, m, n, m).transpose(0, 2, 1, 3).reshape(n * n, m * m)
    np.testing.assert_allclose(blocks * blocks[0, 0], np.outer(blocks[:, 0], blocks[0]), rtol=1e-6, atol=1e-14)
    np.testing.assert_allclose(full, full.T, rtol=1e-6, atol=1e-14)
    eigenvalues = np.linalg.eigvalsh(full)
    assert eigenvalues[-1] / eigenvalues[0] == pytest.approx(1000)
    assert eigenvalues[-1] == pytest.approx(1)


def test_the_quadratic_is_its_own_second_order_expansion() -> None:
    instance = PROBLEMS["kronecker_quadratic"].make(1)
    full, place = hessian(instance), np.random.default_rng(0).standard_normal((24, 40))
    at_zero, (slope,) = loss_and_gradients(instance, np.zeros((24, 40)))
    columns = place.T.reshape(-1)
    loss, (gradient,) = loss_and_gradients(instance, place)
    assert loss == pytest.approx(at_zero + slope.T.reshape(-1) @ columns + columns @ full @ columns / 2)
    assert gradient.T.reshape(-1) == pytest.approx(slope.T.reshape(-1) + full @ columns)
    # The minimum is 0, at one point.
    goal = np.linalg.solve(full, -slope.T.reshape(-1)).reshape(40, 24).T.copy()
    assert loss_and_gradients(instance, goal)[0] == pytest.approx(0, abs=1e-18)


def test_the_factorization_is_half_the_squared_error() -> None:
    instance = PROBLEMS["matrix_factorization"].make(2)
    _, (left_slope, _) = loss_and_gradients(instance, np.zeros((48, 6)), np.eye(32, 6))
    goal = np.zeros((48, 32))
    for shift in range(0, 32, 6):  # at U = 0 the gradient is −M V: six columns of M at a time
        some = np.eye(32, 6, -shift)
        goal += -loss_and_gradients(instance, np.zeros((48, 6)), some)[1][0] @ some.T
    assert left_slope == pytest.approx(-goal[:, :6])
    assert np.linalg.svd(goal, compute_uv=False) == pytest.approx([*np.geomspace(40, 4, 6), *[0] * 26], abs=1e-12)
    rng = np.random.default_rng(0)
    u, v = rng.standard_normal((48, 6)), rng.standard_normal((32, 6))
    error = u @ v.T - goal
    loss, gradients = loss_and_gradients(instance, u, v)
    assert loss == pytest.approx((error**2).sum() / 2)
    assert gradients[0] == pytest.approx(error @ v)
    assert gradients[1] == pytest.approx(error.T @ u)


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients_agree_with_finite_differences(name: str) -> None:
    instance, rng = PROBLEMS[name].make(0), np.random.default_rng(1)
    places = [rng.standard_normal(start.shape) for start in instance.start]
    directions = [rng.standard_normal(place.shape) for place in places]
    _, gradients = loss_and_gradients(instance, *places)
    slope = sum(float((gradient * way).sum()) for gradient, way in zip(gradients, directions, strict=True))
    ends = [
        loss_and_gradients(instance, *(place + width * way for place, way in zip(places, directions, strict=True)))[0]
        for width in (-1e-5, 1e-5)
    ]
    assert (ends[1] - ends[0]) / 2e-5 == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problem_follows_from_its_seed_and_takes_stacks(name: str) -> None:
    first, same, other = (PROBLEMS[name].make(seed) for seed in (3, 3, 4))
    places = [torch.randn(5, *start.shape, dtype=torch.float64) for start in first.start]
    losses = first.loss(places)
    assert losses.shape == (5,)
    assert (losses == same.loss(places)).all()
    assert not torch.isclose(losses, other.loss(places)).any()
    assert losses[2] == pytest.approx(float(first.loss([place[2] for place in places])))
