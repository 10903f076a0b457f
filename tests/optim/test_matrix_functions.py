"""Inverse roots and orthogonalization: accuracy by condition number, singular and broken matrices, stacks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from optim import matrix_functions
from optim.matrix_functions import (
    damped_inverse_root,
    factored_inverse_sqrt,
    full_float32_products,
    inverse_root_eigh,
    inverse_root_newton,
    inverse_sqrt,
    orthogonalize,
    precondition,
)

from .cases import every_optimizer, full_rank, parameter, set_gradient, start
from .reference import (
    NEWTON_SCHULZ,
    coupled_inverse_sqrt,
    inverse_root,
    newton_schulz_orthogonalization,
    polar_express,
)

METHODS = ["eigh", "polar_express", "newton_schulz", "newton", "cholesky"]
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
    ("cholesky", 8, 10, 1e-13, 1e-5),
    ("cholesky", 8, 1e4, 1e-10, 2e-2),
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
    # Forty products round the root by eps √m of its largest eigenvalue, 1 / √(2 eps √m): that of the null space.
    rounding = math.sqrt(12) * torch.finfo(dtype).eps
    assert relative < max(1e-2, 40 * rounding / math.sqrt(2 * rounding))


@every_method
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_gives_what_is_not_finite(method, bad):
    matrix = spectrum(10.0)
    matrix[2, 3] = matrix[3, 2] = bad
    assert not torch.isfinite(inverse_sqrt(stack(matrix), method, 10, EPS)).all()


@every_dtype
@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("condition", [1.0, 10.0, 1e3])
def test_coupled_inverse_newton_reaches_its_tolerance(order, condition, dtype):
    matrix = spectrum(condition)
    root = inverse_root_newton(stack(matrix, dtype=dtype), order, EPS)[0]
    assert error(root, inverse_root(matrix, 1 / order)) < (1e-5 if dtype is torch.float64 else 1e-3)


@every_dtype
@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("function", [damped_inverse_root, inverse_root_newton])
def test_damped_roots_add_the_ridge(function, order, dtype):
    """A ridge well above rounding shows in full, on singular matrices too."""
    for matrix in (spectrum(100.0), spectrum(10.0, rank=2), np.zeros((12, 12))):
        expected = inverse_root(matrix + 1e-2 * np.eye(12), 1 / order)
        assert error(function(stack(matrix, dtype=dtype), order, 1e-2)[0], expected) < 1e-4


@pytest.mark.parametrize("order", [3, 4])
@pytest.mark.parametrize("function", [damped_inverse_root, inverse_root_newton])
def test_damped_roots_of_singular_float32_matrices_are_finite(function, order):
    """Rounding makes eigenvalues slightly negative, by more than a ridge of 1e-10."""
    rng = np.random.default_rng(0)
    factor = torch.tensor(rng.standard_normal((4, 64, 3)), dtype=torch.float32)
    assert torch.isfinite(function(factor @ factor.mT, order, EPS)).all()


@pytest.mark.parametrize(
    ("order", "method"), [(4.0, "newton"), (-1 / -0.333333333, "newton"), (2.5, "eigh")], ids=["4", "3", "2.5"]
)
def test_damped_roots_on_other_devices_iterate_for_whole_orders(order, method, monkeypatch):
    chosen = []
    monkeypatch.setattr(matrix_functions, "inverse_root_newton", lambda *given: chosen.append(("newton", given[1])))
    monkeypatch.setattr(matrix_functions, "inverse_root_eigh", lambda *given, ridge: chosen.append(("eigh", given[1])))
    damped_inverse_root(torch.empty(1, 3, 3, device="meta"), order, EPS)
    assert chosen == [(method, round(order) if method == "newton" else order)]


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6), (1, 7), (7, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("steps", [1, 3, 5])
def test_orthogonalize_is_muons_iteration(shape, steps):
    matrix = np.random.default_rng(0).standard_normal((3, *shape))
    result = orthogonalize(stack(*matrix), steps)
    for one, expected in zip(result, matrix, strict=True):
        assert error(one, newton_schulz_orthogonalization(expected, steps)) < 1e-12


def test_orthogonalize_converges_with_coefficients_that_keep_one_fixed():
    matrix = spectrum(10.0)[:, :8]
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    result = orthogonalize(stack(matrix), 12, (2.0, -1.5, 0.5))
    assert error(result[0], left @ right) < 1e-6


def test_orthogonalize_brings_singular_values_near_one():
    matrix = torch.tensor(spectrum(10.0)[:, :8], dtype=torch.float32)
    singular = torch.linalg.svdvals(orthogonalize(matrix, 5))
    assert 0.65 < singular.min() < singular.max() < 1.25


def test_orthogonalize_in_bfloat16_brings_singular_values_near_one(monkeypatch):
    """As on a GPU, and on a CPU with instructions for it.

    Rounding to u = 2^-8 moves the singular values of a matrix of rank 8 by at most u √8 = 0.011 of the largest. With
    the coefficients 3.4, 4.8 and 2 of the last step, before which all values are near 1, that comes to less than 0.2.
    """
    monkeypatch.setattr(matrix_functions, "_bfloat16_wanted", True)
    matrix = torch.tensor(spectrum(10.0)[:, :8], dtype=torch.float32)
    result = orthogonalize(matrix, 5)
    assert result.dtype is torch.float32
    assert torch.equal(result, result.bfloat16().float())
    singular = torch.linalg.svdvals(result)
    assert 0.65 - 0.2 < singular.min() < singular.max() < 1.25 + 0.2


def test_orthogonalize_of_zero_is_zero():
    assert torch.equal(orthogonalize(torch.zeros(2, 3, 4), 5), torch.zeros(2, 3, 4))


def read_settings() -> dict[str, str]:
    """Every float32 precision of the process, and what the older interface makes of them."""
    backends = torch.backends
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # it has no name for some of what the newer one can say
        older = "none of the older names"
    return {
        "all": backends.fp32_precision,
        "cuda": backends.cudnn.fp32_precision,
        "cuda.matmul": backends.cuda.matmul.fp32_precision,
        "cuda.conv": backends.cudnn.conv.fp32_precision,
        "cuda.rnn": backends.cudnn.rnn.fp32_precision,
        "mkldnn": backends.mkldnn.fp32_precision,
        "mkldnn.matmul": backends.mkldnn.matmul.fp32_precision,
        "mkldnn.conv": backends.mkldnn.conv.fp32_precision,
        "mkldnn.rnn": backends.mkldnn.rnn.fp32_precision,
        "older": older,
    }


OWNERS = {
    "all": torch.backends,
    "cuda.matmul": torch.backends.cuda.matmul,
    "mkldnn.matmul": torch.backends.mkldnn.matmul,
}
PRECISIONS = [
    (owner, precision)
    for owner in OWNERS
    for precision in ("none", "ieee", "tf32", "bf16")
    if (owner, precision) != ("cuda.matmul", "bf16")  # which torch refuses
]


@pytest.fixture
def precision_settings():
    yield OWNERS
    torch.set_float32_matmul_precision("highest")
    for owner in OWNERS.values():
        owner.fp32_precision = "none"


@pytest.mark.parametrize(("owner", "precision"), PRECISIONS)
def test_products_are_in_true_float32_and_every_setting_is_put_back(owner, precision, precision_settings):
    precision_settings[owner].fp32_precision = precision
    before = read_settings()
    with contextlib.suppress(KeyError), full_float32_products():
        inside = read_settings()
        raise KeyError
    assert {inside["cuda.matmul"], inside["mkldnn.matmul"]} <= {"ieee", "none"}
    assert read_settings() == before
    # A setting for all operations is still followed by what has none of its own.
    torch.backends.fp32_precision = "none"
    own = precision if owner != "all" else "none"
    assert {read_settings()[name] for name in OWNERS if owner in (name, "all")} == {own}


@pytest.mark.parametrize("before", ["highest", "high", "medium"])
def test_the_older_interface_and_a_mix_of_both_are_put_back(before, precision_settings):
    torch.set_float32_matmul_precision(before)
    for precision in (None, "tf32", "ieee"):
        if precision is not None:
            precision_settings["cuda.matmul"].fp32_precision = precision
        settings = read_settings()
        with full_float32_products():
            pass
        assert read_settings() == settings


@pytest.mark.parametrize(("owner", "precision"), PRECISIONS)
@every_optimizer
def test_no_step_leaks_a_precision(case, owner, precision, precision_settings):
    """As PyTorch's own test suite checks after each of its tests."""
    param = parameter(start((4, 6)), torch.float32)
    optimizer = case.build([param], **({"root_method": "auto"} if case.name == "ASGO" else {}))
    set_gradient(param, full_rank((4, 6))[0])
    precision_settings[owner].fp32_precision = precision
    before = read_settings()
    optimizer.step()
    assert read_settings() == before


# --- Decompositions that fail, as LAPACK's does on some CPUs for float32 matrices of low rank


def low_rank_matrix(size: int, rank: int, seed: int = 0) -> np.ndarray:
    """Of two to 32 equal or nearly equal eigenvalues, which are what makes `eigh` fail."""
    vectors = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, rank)))[0]
    return (vectors * np.linspace(1.0, 1.5, rank)) @ vectors.T


@pytest.fixture
def break_eigh(monkeypatch):
    """Let `torch.linalg.eigh` raise for the matrices that a predicate names."""
    eigh = torch.linalg.eigh

    def replace(fails: Callable[[Tensor], bool]) -> None:
        def broken(matrices: Tensor) -> Any:
            if any(fails(matrix) for matrix in matrices.reshape(-1, *matrices.shape[-2:])):
                raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")
            return eigh(matrices)

        monkeypatch.setattr(torch.linalg, "eigh", broken)

    return replace


FAILURES = {"in float32": lambda matrix: matrix.dtype is torch.float32, "always": lambda matrix: True}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("rank", [1, 2, 8, 32])
@pytest.mark.parametrize("size", [40, 200])
def test_roots_are_right_where_eigh_fails(size, rank, failure, break_eigh):
    """The root of a float32 matrix is off by the noise of its rounding: eps √m of its norm, for eigenvalues near 1."""
    matrix = low_rank_matrix(size, rank)
    break_eigh(FAILURES[failure])
    tolerance = 10 * math.sqrt(size) * torch.finfo(torch.float32).eps
    root = inverse_sqrt(stack(matrix, dtype=torch.float32), "eigh", 10, EPS)[0]
    assert error(root, inverse_root(matrix, 1 / 2)) < tolerance
    ridge = 1e-2
    root = damped_inverse_root(stack(matrix, dtype=torch.float32), 4, ridge)[0]
    # where the eigenvalue is zero, the root's derivative is ridge^(-5/4) / 4, 32 times what it is at 1
    assert error(root, inverse_root(matrix + ridge * np.eye(size), 1 / 4)) < 32 * tolerance


@every_dtype
def test_one_matrix_that_cannot_be_decomposed_does_not_disturb_the_others(dtype, break_eigh):
    good, bad = spectrum(10.0), 3 * low_rank_matrix(12, 4)
    before = inverse_root_eigh(stack(good, bad, 2 * good, dtype=dtype), 2)
    break_eigh(lambda matrix: bool(torch.allclose(matrix.double(), torch.tensor(bad), atol=1e-6)))
    after = inverse_root_eigh(stack(good, bad, 2 * good, dtype=dtype), 2)
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[2], before[2])
    assert error(after[1], inverse_root(bad, 1 / 2)) < 1e-5


@every_dtype
@pytest.mark.parametrize("failure", [None, "always"])
@pytest.mark.parametrize("value", [0.0, 1.0, 1e-40, 1e30], ids=["zero", "constant", "denormal", "huge"])
def test_matrices_of_one_value(value, failure, dtype, break_eigh):
    if failure:
        break_eigh(FAILURES[failure])
    matrix = torch.full((2, 7, 7), value, dtype=dtype)
    root = inverse_root_eigh(matrix, 2)
    # its one eigenvalue is 7 times the value, its vector constant; a denormal number holds five digits or fewer
    expected = 0.0 if value == 0 else (7 * value) ** -0.5 / 7
    torch.testing.assert_close(root, torch.full_like(root, expected), rtol=1e-4, atol=1e-4 * expected)
    assert torch.isfinite(damped_inverse_root(matrix, 4, EPS)).all()


@every_dtype
def test_a_matrix_that_no_method_decomposes_gives_nan_and_the_others_their_roots(dtype, break_eigh, monkeypatch):
    bad = spectrum(10.0, seed=1)
    svd = torch.linalg.svd

    def is_bad(matrix: Tensor) -> bool:
        return bool(torch.allclose(matrix.double(), torch.tensor(bad), atol=1e-6))

    def broken(matrix: Tensor) -> Any:
        if is_bad(matrix):
            raise torch.linalg.LinAlgError("linalg.svd: The algorithm failed to converge")
        return svd(matrix)

    break_eigh(is_bad)
    monkeypatch.setattr(torch.linalg, "svd", broken)
    for order, ridge in ((2, None), (4, EPS)):
        good, nothing = inverse_root_eigh(stack(spectrum(10.0), bad, dtype=dtype), order, ridge)
        assert error(good, inverse_root(spectrum(10.0), 1 / order)) < 1e-5
        assert nothing.isnan().all()


# --- Cholesky factor and its polar factor


def gradient_with(condition: float, shape: tuple[int, int] = (48, 96), seed: int = 0) -> Tensor:
    """A float64 gradient whose Gram matrix has log-spaced eigenvalues from 1 down to 1 / condition."""
    rng = np.random.default_rng(seed)
    rows, columns = (np.linalg.qr(rng.standard_normal((side, shape[0])))[0] for side in shape)
    return torch.tensor((rows * np.logspace(0, -np.log10(condition) / 2, shape[0])) @ columns.T)


def direction(update: Tensor) -> Tensor:
    return update.double() / torch.linalg.matrix_norm(update.double())


# Three products and three roundings to bfloat16 a step, 2**-9 each, of which those that rotate the rows add up over
# eight steps: 3 * sqrt(8) * 2**-9 / sqrt(3) is 1e-2 at most. A ridge of 4 roundings of float32 changes the smallest
# eigenvalue by 4 * 1.2e-7 * condition, half of which is the error of its root.
@pytest.mark.parametrize(
    ("precision", "condition", "limit"),
    [("bf16", 1e2, 1e-2), ("bf16", 1e4, 1.5e-2), ("bf16", 1e6, 1.5e-1), ("fp32", 1e2, 5e-5), ("fp32", 1e4, 3e-3)],
)
def test_the_update_by_cholesky_is_as_exact_as_its_precision(precision, condition, limit):
    gradient = gradient_with(condition)
    values, vectors = torch.linalg.eigh(gradient @ gradient.mT)
    expected = (vectors * values.rsqrt()) @ vectors.mT @ gradient
    single = gradient.float()
    factors = factored_inverse_sqrt((single @ single.mT)[None], 8, precision)
    found = precondition(factors, single[None], precision)[0]
    assert torch.linalg.matrix_norm(direction(found) - direction(expected)) < limit
    whole = inverse_sqrt((single @ single.mT)[None], "cholesky", 8, EPS, precision)[0] @ single
    assert torch.linalg.matrix_norm(direction(whole) - direction(expected)) < limit


@pytest.mark.parametrize("rank", [1, 4, 40])
def test_cholesky_factors_of_low_rank_matrices_exist(rank):
    """Their zero eigenvalues are rounding errors of either sign, which grow with the largest eigenvalue."""
    rng = np.random.default_rng(rank)
    positive = torch.tensor(rng.random((256, rank)) @ rng.random((rank, 256)), dtype=torch.float32)
    signed = torch.tensor(rng.standard_normal((256, rank)) @ rng.standard_normal((rank, 256)), dtype=torch.float32)
    grams = torch.stack([each @ each.mT for each in (positive, signed, torch.ones(256, 256))])
    assert torch.isfinite(factored_inverse_sqrt(grams, 8, "bf16")).all()


def test_a_matrix_without_a_cholesky_factor_gives_nan_and_spoils_no_neighbour():
    indefinite, good = np.diag([1.0, -1.0, 1.0]), spectrum(10.0, size=3)
    factors = factored_inverse_sqrt(stack(indefinite, good), 8, "fp32")
    assert torch.isnan(factors[0, 0]).any()
    assert torch.equal(factors[1], factored_inverse_sqrt(stack(good), 8, "fp32")[0])


@pytest.mark.parametrize("order", [1, 2, 3, 4, 8])
def test_newton_converges_within_its_steps_at_any_condition_number(order):
    for dtype in (torch.float32, torch.float64):
        for size in (1, 3, 64):
            matrix = stack(spectrum(1e30, size), spectrum(1.0, size), np.ones((size, size)), dtype=dtype)
            limited = inverse_root_newton(matrix, order, 0.0)
            with mock.patch.object(matrix_functions, "_newton_steps", return_value=200):
                assert torch.equal(inverse_root_newton(matrix, order, 0.0), limited)
