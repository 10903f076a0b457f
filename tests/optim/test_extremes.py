"""Condition numbers, ranks, sizes and magnitudes at their ends, against the exact update in float64.

After one step, ASGO's update is the gradient's polar factor, and so is Shampoo's without its ridge: `P Qᵀ` for a
gradient `P S Qᵀ` of full rank, whatever its singular values. Without a decomposition that is known at any size.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from optim import ASGO, Muon, Shampoo

from .cases import DESCRIPTIONS, full_rank, parameter, set_gradient
from .reference import newton_schulz_orthogonalization

BY_NAME = {case.name: case for case in DESCRIPTIONS}
METHODS = ["auto", "eigh", "polar_express", "newton_schulz", "newton"]


def orthogonal(size: int, seed: int = 0) -> np.ndarray:
    """A random reflection of the discrete cosine basis: orthogonal to rounding, at the cost of one product."""
    k = np.arange(size)
    basis = np.cos(np.pi * (2 * k[:, None] + 1) * k / (2 * size)) * math.sqrt(2 / size)
    basis[:, 0] /= math.sqrt(2)
    v = np.random.default_rng(seed).standard_normal(size)
    return basis - np.outer(v, 2 * (v @ basis) / (v @ v))


def gradient_of(shape: tuple[int, int], condition: float, rank: int | None = None) -> np.ndarray:
    """Its Gram matrix has log-spaced eigenvalues down to `1 / condition`; beyond the rank, zeros."""
    rank = rank or min(shape)
    values = np.logspace(0, -np.log10(condition) / 2, rank)
    return (orthogonal(shape[0])[:, :rank] * values) @ orthogonal(shape[1], 1)[:, :rank].T


def update(optimizer_class, gradient: np.ndarray, dtype: torch.dtype, steps: int = 1, **keywords) -> np.ndarray:
    """What `steps` steps with the same gradient add to a weight of zeros, as a unit vector."""
    param = parameter(np.zeros(gradient.shape), dtype)
    optimizer = optimizer_class([param], lr=1.0, weight_decay=0.0, **keywords)
    set_gradient(param, gradient)
    for _ in range(steps):
        optimizer.step()
    result = -param.detach().double().numpy()
    return result / np.linalg.norm(result)


def polar_factor(gradient: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Of the gradient as it is in that precision, as a unit vector; numerically zero directions are left out."""
    rounded = torch.tensor(gradient, dtype=dtype).double().numpy()
    left, values, right = np.linalg.svd(rounded, full_matrices=False)
    kept = values > values[0] * 1e-12
    return left[:, kept] @ right[kept] / math.sqrt(kept.sum())


def error(mine: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(mine - expected))


@pytest.mark.parametrize("shape", [(96, 96), (64, 160), (160, 64)], ids=str)
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
@pytest.mark.parametrize("method", METHODS)
def test_asgo_in_float32_up_to_condition_1e4(method, condition, shape):
    steps = {"root_steps": 20} if method == "newton_schulz" else {}
    gradient = gradient_of(shape, condition)
    mine = update(ASGO, gradient, torch.float32, root_method=method, **steps)
    assert error(mine, polar_factor(gradient, torch.float32)) < 1e-3


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
def test_shampoo_in_float32_up_to_condition_1e4(condition):
    gradient = 1e3 * gradient_of((64, 160), condition)  # its ridge of 1e-10 does not matter at this size
    assert error(update(Shampoo, gradient, torch.float32), polar_factor(gradient, torch.float32)) < 1e-3


@pytest.mark.parametrize("condition", [1.0, 1e4, 1e12])
def test_muon_in_float32(condition):
    gradient = gradient_of((64, 160), condition)
    expected = newton_schulz_orthogonalization(0.1 * gradient, 5)
    assert error(update(Muon, gradient, torch.float32), expected / np.linalg.norm(expected)) < 3e-2


@pytest.mark.parametrize("method", ["auto", "eigh"])
def test_a_decomposition_in_float32_is_right_up_to_condition_1e6(method):
    gradient = gradient_of((96, 160), 1e6)
    assert (
        error(update(ASGO, gradient, torch.float32, root_method=method), polar_factor(gradient, torch.float32)) < 3e-3
    )


@pytest.mark.parametrize(
    ("method", "condition", "steps"),
    [
        *[(method, condition, 10) for method in ("auto", "eigh") for condition in (1e6, 1e9, 1e12)],
        ("newton", 1e6, 10),
        ("polar_express", 1e6, 20),
        ("newton_schulz", 1e6, 40),
    ],
)
def test_float64_beyond_condition_1e4(method, condition, steps):
    gradient = gradient_of((96, 160), condition)
    assert (
        error(
            update(ASGO, gradient, torch.float64, root_method=method, root_steps=steps),
            polar_factor(gradient, torch.float64),
        )
        < 1e-3
    )


@pytest.mark.parametrize("condition", [1e6, 1e9, 1e12])
@pytest.mark.parametrize("method", METHODS)
def test_beyond_float32_the_large_directions_are_right_and_the_small_ones_bounded(method, condition):
    """Rounding of the Gram matrix hides eigenvalues below 1e-7 of the largest; what is above must not suffer."""
    shape, steps = (96, 160), {"root_steps": 20} if method == "newton_schulz" else {}
    gradient = gradient_of(shape, condition)
    param = parameter(np.zeros(shape), torch.float32)
    optimizer = ASGO([param], lr=1.0, weight_decay=0.0, root_method=method, **steps)
    set_gradient(param, gradient)
    optimizer.step()
    left, right = orthogonal(shape[0]), orthogonal(shape[1], 1)[:, : shape[0]]
    gains = np.diag(-left.T @ param.detach().double().numpy() @ right)
    eigenvalues = np.logspace(0, -np.log10(condition), shape[0])
    large = gains[eigenvalues > 1e-4]
    assert np.abs(large / large[0] - 1).max() < 2e-2  # all directions move alike
    assert np.abs(gains).max() < 3 * large[0]


@pytest.mark.parametrize("rank", [1, 2, 8, 40, 64])
@pytest.mark.parametrize("method", METHODS)
def test_ranks_from_one_to_full(method, rank):
    gradient = gradient_of((64, 100), 10.0, rank)
    mine = update(ASGO, gradient, torch.float32, steps=3, root_method=method)
    left, right = orthogonal(64)[:, :rank], orthogonal(100, 1)[:, :rank]
    assert error(mine, left @ right.T / math.sqrt(rank)) < 1e-2
    assert np.linalg.norm(orthogonal(64)[:, rank:].T @ mine) < 1e-2  # no update outside the gradient's range


@pytest.mark.parametrize(
    ("optimizer_class", "shape"),
    [
        *[(ASGO, shape) for shape in [(1, 1), (1, 3072), (3072, 1), (2, 3), (3072, 64)]],
        *[(Shampoo, shape) for shape in [(1, 1), (1, 300), (300, 1), (2, 3), (2304, 64)]],
    ],
)
def test_sizes(optimizer_class, shape):
    gradient = 1e3 * gradient_of(shape, 10.0)
    expected = orthogonal(shape[0])[:, : min(shape)] @ orthogonal(shape[1], 1)[:, : min(shape)].T
    assert error(update(optimizer_class, gradient, torch.float32), expected / math.sqrt(min(shape))) < 1e-3


def test_the_largest_size():
    """A diagonal, reflected: its polar factor is the reflection."""
    v = np.random.default_rng(0).standard_normal(3072).astype(np.float32)
    reflection = np.eye(3072, dtype=np.float32) - np.outer(v, 2 * v / (v @ v))
    gradient = reflection * np.logspace(0, -1, 3072, dtype=np.float32)
    assert error(update(ASGO, gradient, torch.float32), reflection / math.sqrt(3072)) < 1e-3


@pytest.mark.parametrize("scale", [1e-20, 1e-10, 1e10, 1e20])
@pytest.mark.parametrize("name", ["ASGO", "DASGO", "Muon", "Shampoo"])
def test_magnitudes_of_gradients(name, scale):
    """Against the float64 reference, whose range they do not leave; from a middling size to an end and back."""
    case, shape = BY_NAME[name], (12, 20)
    param, refer = parameter(np.zeros(shape), torch.float32), case.refer(np.zeros(shape), weight_decay=0.0)
    optimizer = case.build([param], weight_decay=0.0)
    for index, gradient in enumerate(full_rank(shape, 9)):
        scaled = (gradient * (scale if 3 <= index < 6 else 1.0)).astype(np.float32)
        set_gradient(param, scaled)
        optimizer.step()
        refer.step(scaled)
        mine, expected = param.detach().double().numpy(), refer.parameter
        assert np.linalg.norm(mine - expected) < 2e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
@pytest.mark.parametrize("name", ["ASGO", "DASGO", "Muon", "Shampoo"])
def test_magnitudes_from_the_first_step(name, scale):
    case, shape = BY_NAME[name], (12, 20)
    param, refer = parameter(np.zeros(shape), torch.float32), case.refer(np.zeros(shape), weight_decay=0.0)
    optimizer = case.build([param], weight_decay=0.0)
    for gradient in full_rank(shape, 4):
        scaled = (gradient * scale).astype(np.float32)
        set_gradient(param, scaled)
        optimizer.step()
        refer.step(scaled)
    mine, expected = param.detach().double().numpy(), refer.parameter
    assert np.linalg.norm(mine - expected) < 1e-3 * np.linalg.norm(expected)
