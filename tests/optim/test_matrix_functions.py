"""Inverse roots and orthogonalization: accuracy by condition number, singular and broken matrices, stacks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from optim.matrix_functions import (
    inverse_fourth_root,
    inverse_root_eigh,
    inverse_root_newton,
    inverse_sqrt,
    orthogonalize,
)

from .reference import (
    NEWTON_SCHULZ,
    coupled_inverse_sqrt,
    inverse_root,
    newton_schulz_orthogonalization,
    polar_express,
)

METHODS = ["eigh", "polar_express", "newton_schulz", "newton"]
EPS = 1e-10
every_method = pytest.mark.parametrize("method", METHODS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def spectrum(condition: float, size: int = 12, rank: int | None = None, seed: int = 0) -> np.ndarray:
    """A symmetric matrix with log-spaced eigenvalues from 1 down to 1 / condition; beyond `rank`, zeros."""
    rng = np.random.default_rng(seed)
    vectors = np.linalg.qr(rng.standard_normal((size, size)))[0][:, :rank]
    eigenvalues = np.logspace(0, -np.log10(condition), vectors.shape[1])
    return (vectors * eigenvalues) @ vectors.T


def stack(*matrices: np.ndarray, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(np.stack(matrices), dtype=dtype)


def error(result: Tensor, expected: np.ndarray) -> float:
    return float(np.linalg.norm(result.double().numpy() - expected) / np.linalg.norm(expected))


# Condition number and the relative errors allowed in float64 and float32, about ten times those measured.
ACCURACY = [
    ("eigh", 10, 10, 1e-14, 1e-5),
    ("eigh", 10, 1e4, 1e-11, 1e-2),
    ("polar_express", 10, 10, 1e-13, 1e-5),
    ("polar_express", 10, 1e4, 1e-10, 2e-2),
    ("newton_schulz", 10, 10, 1e-12, 1e-5),
    ("newton_schulz", 20, 1e4, 1e-10, 2e-2),
    ("newton", 10, 10, 1e-5, 1e-5),
    ("newton", 10, 1e4, 2e-5, 2e-2),
]


@every_dtype
@pytest.mark.parametrize(("method", "steps", "condition", "double", "single"), ACCURACY)
def test_inverse_sqrt_is_as_exact_as_the_condition_number_allows(method, steps, condition, double, single, dtype):
    matrix = spectrum(condition)
    root = inverse_sqrt(stack(matrix, dtype=dtype), method, steps, EPS)[0]
    assert root.dtype is dtype
    assert error(root, inverse_root(matrix, 1 / 2)) < (double if dtype is torch.float64 else single)


@pytest.mark.parametrize("steps", [1, 2, 5, 7, 8, 10])
def test_polar_express_takes_the_published_coefficients_in_order(steps):
    """Few steps do not converge: only the same coefficients give the same iterate."""
    matrix = spectrum(1e4)
    expected = coupled_inverse_sqrt(matrix, polar_express(steps), EPS)
    assert error(inverse_sqrt(stack(matrix), "polar_express", steps, EPS)[0], expected) < 1e-10


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_newton_schulz_takes_the_same_coefficients_at_every_step(steps):
    matrix = spectrum(1e3)
    expected = coupled_inverse_sqrt(matrix, [NEWTON_SCHULZ] * steps, EPS)
    assert error(inverse_sqrt(stack(matrix), "newton_schulz", steps, EPS)[0], expected) < 1e-10


def test_auto_is_eigh_on_a_cpu():
    matrix = stack(spectrum(100.0))
    assert torch.equal(inverse_sqrt(matrix, "auto", 10, EPS), inverse_sqrt(matrix, "eigh", 10, EPS))


@every_method
def test_a_stack_gives_what_its_matrices_give_one_by_one(method):
    """Neighbours that need more steps, are zero, or are not finite, change nothing."""
    matrices = [
        spectrum(3.0),
        spectrum(1e3, seed=1),
        0 * spectrum(1.0),
        np.full((12, 12), np.nan),
        1e6 * spectrum(30.0),
    ]
    together = inverse_sqrt(stack(*matrices), method, 10, EPS)
    for matrix, result in zip(matrices, together, strict=True):
        alone = inverse_sqrt(stack(matrix), method, 10, EPS)[0]
        torch.testing.assert_close(result, alone, rtol=1e-10, atol=1e-10, equal_nan=True)


@every_dtype
@every_method
def test_the_root_scales_with_the_matrix(method, dtype):
    matrix, factor = spectrum(10.0), 2.0**40
    for scaled in (matrix * factor, matrix / factor):
        # eps is absolute, and must be small beside the matrix
        root = inverse_sqrt(stack(scaled, dtype=dtype), method, 12, 1e-20)[0]
        assert error(root, inverse_root(scaled, 1 / 2)) < 1e-4


@every_method
def test_the_root_is_symmetric(method):
    root = inverse_sqrt(stack(spectrum(1e5), dtype=torch.float32), method, 10, EPS)
    assert (root - root.mT).abs().max() < 1e-4 * root.abs().max()


@every_dtype
def test_eigh_of_a_zero_matrix_is_zero(dtype):
    zeros = torch.zeros(2, 5, 5, dtype=dtype)
    assert torch.equal(inverse_sqrt(zeros, "eigh", 10, EPS), zeros)


@every_dtype
@every_method
def test_a_zero_matrix_has_a_finite_root(method, dtype):
    """The momentum beside it is zero, so any finite root gives the zero update; NaN would not."""
    assert torch.isfinite(inverse_sqrt(torch.zeros(1, 5, 5, dtype=dtype), method, 10, EPS)).all()


@every_dtype
@pytest.mark.parametrize("rank", [1, 3, 11])
def test_eigh_of_a_singular_matrix_has_no_component_in_its_null_space(rank, dtype):
    matrix = spectrum(10.0, rank=rank)
    root = inverse_root_eigh(stack(matrix, dtype=dtype), 2)[0]
    assert error(root, inverse_root(matrix, 1 / 2)) < (1e-10 if dtype is torch.float64 else 1e-4)
    assert np.linalg.matrix_rank(root.double().numpy(), tol=1e-3) == rank


@every_dtype
@pytest.mark.parametrize("rank", [1, 3, 11])
@every_method
def test_the_root_of_a_singular_matrix_is_right_on_its_range(method, rank, dtype):
    """Where gradients have components, the product with the root is exact; the rest stays bounded."""
    matrix = spectrum(10.0, rank=rank)
    root = inverse_sqrt(stack(matrix, dtype=dtype), method, 10, EPS)[0]
    momentum = matrix @ np.random.default_rng(3).standard_normal((12, 5))
    assert torch.isfinite(root).all()
    relative = error(root.double() @ torch.tensor(momentum), inverse_root(matrix, 1 / 2) @ momentum)
    assert relative < 1e-2


@every_method
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_gives_what_is_not_finite(method, bad):
    matrix = spectrum(10.0)
    matrix[2, 3] = matrix[3, 2] = bad
    assert not torch.isfinite(inverse_sqrt(stack(matrix), method, 10, EPS)).all()


@every_dtype
@pytest.mark.parametrize("order", [2, 4])
@pytest.mark.parametrize("condition", [1.0, 10.0, 1e3])
def test_coupled_inverse_newton_reaches_its_tolerance(order, condition, dtype):
    matrix = spectrum(condition)
    root = inverse_root_newton(stack(matrix, dtype=dtype), order, EPS)[0]
    assert error(root, inverse_root(matrix, 1 / order)) < (1e-5 if dtype is torch.float64 else 1e-3)


@every_dtype
@pytest.mark.parametrize("function", [inverse_fourth_root, lambda matrix, eps: inverse_root_newton(matrix, 4, eps)])
def test_fourth_roots_add_the_ridge(function, dtype):
    """A ridge well above rounding shows in full, on singular matrices too."""
    for matrix in (spectrum(100.0), spectrum(10.0, rank=2), np.zeros((12, 12))):
        expected = inverse_root(matrix + 1e-2 * np.eye(12), 1 / 4)
        assert error(function(stack(matrix, dtype=dtype), 1e-2)[0], expected) < 1e-4


@pytest.mark.parametrize("function", [inverse_fourth_root, lambda matrix, eps: inverse_root_newton(matrix, 4, eps)])
def test_fourth_roots_of_singular_float32_matrices_are_finite(function):
    """Rounding makes eigenvalues slightly negative, by more than a ridge of 1e-10."""
    rng = np.random.default_rng(0)
    factor = torch.tensor(rng.standard_normal((4, 64, 3)), dtype=torch.float32)
    assert torch.isfinite(function(factor @ factor.mT, EPS)).all()


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6), (1, 7), (7, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("steps", [1, 3, 5])
def test_orthogonalize_is_muons_iteration(shape, steps):
    matrix = np.random.default_rng(0).standard_normal((3, *shape))
    result = orthogonalize(stack(*matrix), steps)
    for one, expected in zip(result, matrix, strict=True):
        assert error(one, newton_schulz_orthogonalization(expected, steps)) < 1e-12


def test_orthogonalize_brings_singular_values_near_one():
    matrix = torch.tensor(spectrum(10.0)[:, :8], dtype=torch.float32)
    singular = torch.linalg.svdvals(orthogonalize(matrix, 5))
    assert 0.65 < singular.min() < singular.max() < 1.25


def test_orthogonalize_of_zero_is_zero():
    assert torch.equal(orthogonalize(torch.zeros(2, 3, 4), 5), torch.zeros(2, 3, 4))


@pytest.mark.parametrize("before", ["highest", "high"])
@every_method
def test_the_matmul_precision_is_put_back(method, before):
    kept = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(before)
    try:
        inverse_sqrt(stack(spectrum(10.0), dtype=torch.float32), method, 10, EPS)
        assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision(kept)
