"""Condition numbers, ranks, sizes and magnitudes at their ends, against the exact update in float64.

After one step, ASGO's update is the gradient's polar factor, and so is Shampoo's without its ridge: `P Qᵀ` for a
gradient `P S Qᵀ` of full rank, whatever its singular values. Without a decomposition that is known at any size.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from optim import ASGO, AccAsro, Asro, Muon, Shampoo, elementwise, native, rows
from optim.matrix_functions import inverse_sqrt
from tests.long import long

from .cases import DESCRIPTIONS, Description, every_optimizer, full_rank, noise, parameter, set_gradient
from .reference import inverse_root, newton_schulz_orthogonalization

BY_NAME = {case.name: case for case in DESCRIPTIONS}


@pytest.fixture
def no_compiler(monkeypatch):
    """As on a machine without a C compiler."""
    monkeypatch.setattr(native, "is_available", lambda: False)


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


def rounding(condition: float, size: int = 160, dtype: torch.dtype = torch.float32) -> float:
    """How far an update is moved, as a share, by sums of `size` products, each off by eps √size of what it adds.

    Forty of them make a root by iteration; of the Gram matrix, a direction of eigenvalue 1 / condition is off by
    condition times as much, and its inverse square root by half of that.
    """
    return math.sqrt(size) * torch.finfo(dtype).eps * (40 + condition / 2)


def error(mine: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(mine - expected))


@pytest.mark.parametrize("shape", [(96, 96), (64, 160), (160, 64)], ids=str)
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
@pytest.mark.parametrize("method", METHODS)
def test_asgo_in_float32_up_to_condition_1e4(method, condition, shape):
    steps = {"root_steps": 20} if method == "newton_schulz" else {}
    gradient = gradient_of(shape, condition)
    mine = update(ASGO, gradient, torch.float32, root_method=method, **steps)
    assert error(mine, polar_factor(gradient, torch.float32)) < rounding(condition)


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
def test_shampoo_in_float32_up_to_condition_1e4(condition):
    gradient = 1e3 * gradient_of((64, 160), condition)  # its ridge of 1e-10 does not matter at this size
    assert error(update(Shampoo, gradient, torch.float32), polar_factor(gradient, torch.float32)) < rounding(condition)


@pytest.mark.parametrize("condition", [1.0, 1e4, 1e12])
def test_muon_in_float32(condition):
    gradient = gradient_of((64, 160), condition)
    expected = newton_schulz_orthogonalization(0.1 * gradient, 5)
    # Five steps, each of which rounds by eps √160 and makes small values 3.4 times as large.
    tolerance = 5 * 3.4445**5 * math.sqrt(160) * torch.finfo(torch.float32).eps
    assert error(update(Muon, gradient, torch.float32), expected / np.linalg.norm(expected)) < tolerance


@pytest.mark.parametrize("method", ["auto", "eigh"])
def test_a_decomposition_in_float32_is_right_up_to_condition_1e6(method):
    """Of the matrix as it is in float32: how a CPU rounds the products that make it is another matter."""
    gradient = gradient_of((96, 160), 1e6)
    gram = torch.tensor(gradient @ gradient.T, dtype=torch.float32)
    root, expected = inverse_sqrt(gram[None], method, 10, 1e-10)[0], inverse_root(gram.double().numpy(), 1 / 2)
    assert error(root.double().numpy(), expected) < rounding(1.0, 96) * np.linalg.norm(expected)


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
        < max(1e-3, rounding(condition, dtype=torch.float64))  # an iteration need not converge further
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
    assert np.abs(large / large[0] - 1).max() < 2 * rounding(1e4)  # all directions move alike
    # An eigenvalue that is rounded down from eps √160 to eps, the noise floor, makes a gain √√160 times as large.
    assert np.abs(gains).max() < (1 + 160**0.25) * large[0]


@pytest.mark.parametrize("rank", [1, 2, 8, 40, 64])
@pytest.mark.parametrize("method", METHODS)
def test_ranks_from_one_to_full(method, rank):
    """An iteration's root of a null direction is 1 / √(2 eps √64) = 720 at most, of eps √100 of rounding there."""
    gradient = gradient_of((64, 100), 10.0, rank)
    mine = update(ASGO, gradient, torch.float32, steps=3, root_method=method)
    left, right = orthogonal(64)[:, :rank], orthogonal(100, 1)[:, :rank]
    assert error(mine, left @ right.T / math.sqrt(rank)) < 1e-2
    assert np.linalg.norm(orthogonal(64)[:, rank:].T @ mine) < 1e-2  # no update outside the gradient's range


@pytest.mark.parametrize(
    ("optimizer_class", "shape"),
    [
        *[(ASGO, shape) for shape in [(1, 1), (1, 3072), (3072, 1), (2, 3), (3072, 64)]],
        *[(Shampoo, shape) for shape in [(1, 1), (1, 300), (300, 1), (2, 3), (2304, 32)]],
    ],
)
def test_sizes(optimizer_class, shape):
    gradient = 1e3 * gradient_of(shape, 10.0)
    expected = orthogonal(shape[0])[:, : min(shape)] @ orthogonal(shape[1], 1)[:, : min(shape)].T
    bound = rounding(10.0, max(160, *shape))
    assert error(update(optimizer_class, gradient, torch.float32), expected / math.sqrt(min(shape))) < bound


@long
def test_the_largest_size():
    """A diagonal, reflected: its polar factor is the reflection."""
    v = np.random.default_rng(0).standard_normal(3072).astype(np.float32)
    reflection = np.eye(3072, dtype=np.float32) - np.outer(v, 2 * v / (v @ v))
    gradient = reflection * np.logspace(0, -1, 3072, dtype=np.float32)
    assert error(update(ASGO, gradient, torch.float32), reflection / math.sqrt(3072)) < rounding(100.0, 3072)


@pytest.mark.parametrize("rank", [1, 2, 8, 32])
@pytest.mark.parametrize("size", [64, 300, 512])
@pytest.mark.parametrize("optimizer_class", [ASGO, Shampoo])
def test_low_ranks_at_several_sizes(optimizer_class, size, rank):
    """Rounding leaves 1e-8 of the gradient in a null direction, of which a root makes 1 / √eps = 2,900 times as much.

    That is 3e-5 in each of 512 directions, beside 1 in those of the range: 7e-4 of rank 1, less of others.
    """
    gradient = 1e3 * gradient_of((size, size), 10.0, rank)
    expected = orthogonal(size)[:, :rank] @ orthogonal(size, 1)[:, :rank].T / math.sqrt(rank)
    assert error(update(optimizer_class, gradient, torch.float32), expected) < 1e-3


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
        # Each update is off by eps √20 · 3.4^5 = 3e-4 with Muon, which makes the most of rounding; nine add up.
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


SMALL, NATIVE = (4, 6), (200, 200)
"""The second is above `native.WORTH_FROM`."""


def after_a_spike(
    case: Description, shape: tuple[int, int], spike: float, dtype: torch.dtype = torch.float32, steps: int = 6
) -> torch.Tensor:
    """The weights after steps with usual gradients, of which the third has one entry of the spike's size."""
    param = parameter(np.ones(shape), dtype)
    optimizer = case.build([param])
    for index, gradient in enumerate(noise(shape, steps)):
        set_gradient(param, gradient)
        if index == 2:
            param.grad[1, 2] = spike
        optimizer.step()
    return param.detach()


@pytest.mark.parametrize("spike", [3e19, -1e25, 1e38, 3.4e38])
@pytest.mark.parametrize("shape", [SMALL, NATIVE])
@every_optimizer
def test_one_huge_gradient_leaves_all_weights_finite(case, shape, spike):
    assert torch.isfinite(after_a_spike(case, shape, spike)).all()


@pytest.mark.parametrize("optimizer_class", [Asro, AccAsro])
@pytest.mark.parametrize("shape", [SMALL, NATIVE])
@pytest.mark.parametrize("compiler", [True, False])
def test_one_huge_gradient_concerns_no_other_weight(compiler, shape, optimizer_class, request):
    if not compiler:
        request.getfixturevalue("no_compiler")
    case = BY_NAME[optimizer_class.__name__]
    spiked, usual = after_a_spike(case, shape, 3e38), after_a_spike(case, shape, 1.0)
    others = torch.ones(shape, dtype=torch.bool)
    others[1, 2] = False
    assert torch.equal(spiked[others], usual[others])
    assert torch.isfinite(spiked).all()


@pytest.mark.parametrize("name", ["Asro", "AccAsro"])
def test_one_huge_gradient_where_all_numbers_are_tensors(name, monkeypatch):
    """As they are in a graph that is compiled for a GPU."""

    def run(self, of_all, scalars):
        rows.update_rows(type(self).update, of_all, {key: torch.tensor(value) for key, value in scalars.items()})

    usual = after_a_spike(BY_NAME[name], SMALL, 3e38)
    monkeypatch.setattr(elementwise.ElementwiseOptimizer, "_run", run)
    # a float32 number instead of a double one: three roundings a step
    torch.testing.assert_close(after_a_spike(BY_NAME[name], SMALL, 3e38), usual, rtol=2e-6, atol=2e-6)
    assert torch.isfinite(usual).all()


@pytest.mark.parametrize(
    ("dtype", "spike"),
    [(torch.float16, 6e4), (torch.bfloat16, 3e19), (torch.bfloat16, 3.3e38), (torch.float64, 1e160)],
    ids=str,
)
@every_optimizer
def test_one_huge_gradient_in_other_precisions(case, dtype, spike):
    assert torch.isfinite(after_a_spike(case, SMALL, spike, dtype)).all()


@every_optimizer
def test_gradients_all_huge(case):
    """Norms and sums of squares leave float32, though no entry does."""
    param = parameter(np.ones(NATIVE), torch.float32)
    optimizer = case.build([param])
    for index, gradient in enumerate(noise(NATIVE, 5)):
        set_gradient(param, np.sign(gradient) * 3.4e38 if index == 1 else gradient)
        optimizer.step()
        assert torch.isfinite(param).all()


@pytest.mark.parametrize("shape", [SMALL, NATIVE])
@pytest.mark.parametrize("name", ["Asro", "AccAsro", "DASGO"])
def test_an_infinite_second_moment_from_a_checkpoint(name, shape):
    param = parameter(np.ones(shape), torch.float32)
    optimizer = BY_NAME[name].build([param])
    for index, gradient in enumerate(noise(shape, 4)):
        set_gradient(param, gradient)
        optimizer.step()
        if index == 0:
            state = optimizer.state_dict()
            state["state"][0]["column_rms" if name == "DASGO" else "exp_avg_sq"].view(-1)[3] = torch.inf
            optimizer.load_state_dict(state)
    assert torch.isfinite(param).all()


@pytest.mark.parametrize("scale", [1e-37, 1e-38, 1e-40, 1e-44])
@pytest.mark.parametrize("shape", [SMALL, NATIVE])
@every_optimizer
def test_denormal_gradients(case, shape, scale):
    param = parameter(np.ones(shape), torch.float32)
    optimizer = case.build([param])
    for gradient in noise(shape, 3):
        set_gradient(param, scale * gradient)
        optimizer.step()
    assert torch.isfinite(param).all()


@pytest.mark.parametrize("shape", [SMALL, NATIVE])
def test_dasgo_is_right_down_to_denormal_momenta(shape):
    """Denormal numbers are 1.4e-45 apart, so a momentum of 1e-39 is rounded by less than a millionth."""
    param, refer = parameter(np.zeros(shape), torch.float32), BY_NAME["DASGO"].refer(np.zeros(shape))
    optimizer = BY_NAME["DASGO"].build([param])
    for gradient in noise(shape, 3):
        scaled = (1e-38 * gradient).astype(np.float32)
        set_gradient(param, scaled)
        optimizer.step()
        refer.step(scaled)
    mine = param.detach().double().numpy()
    assert np.linalg.norm(mine - refer.parameter) < 1e-5 * np.linalg.norm(refer.parameter)


# --- Sides that are too long for a factor


@pytest.mark.parametrize("shape", [(1, 1_000_000), (100_000, 8)])
def test_shampoo_says_which_side_it_leaves_alone(shape):
    param = torch.nn.Parameter(torch.ones(shape))
    with pytest.warns(UserWarning, match=rf"side of {max(shape)} of parameter 'layer.weight'.*rule='adam'"):
        optimizer = Shampoo([("layer.weight", param)])
    param.grad = torch.ones(shape)
    optimizer.step()
    assert torch.isfinite(param).all()
    assert not torch.equal(param, torch.ones(shape))
    assert [tuple(v.shape) for k, v in optimizer.state[param].items() if k.endswith("factor")] == [(min(shape),) * 2]


def test_shampoo_warns_of_no_shorter_side(recwarn):
    Shampoo([torch.nn.Parameter(torch.ones(4, 10_000))])
    Shampoo([{"params": [torch.nn.Parameter(torch.ones(20_000, 4))], "row_blocks": 4}])
    Shampoo([{"params": [torch.nn.Parameter(torch.ones(20_000, 4))], "rule": "adam"}])
    Shampoo([{"params": [torch.nn.Parameter(torch.ones(20_000, 4, 4))], "batch_dims": 1}])
    assert not recwarn.list


@pytest.mark.filterwarnings("ignore:Shampoo does not precondition the side")
@pytest.mark.parametrize(("limit", "kept"), [(9, 2), (8, 1), (3, 0)])
@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_shampoo_preconditions_the_sides_up_to_the_limit(shape, limit, kept, monkeypatch):
    monkeypatch.setattr(Shampoo, "side_limit", limit)
    gradient = full_rank(shape)[0]
    wide = gradient if shape[0] < shape[1] else gradient.T
    expected = wide
    if kept > 0:
        expected = inverse_root(0.001 * wide @ wide.T + 1e-10 * np.eye(4), 1 / 4) @ expected
    if kept > 1:
        expected = expected @ inverse_root(0.001 * wide.T @ wide + 1e-10 * np.eye(9), 1 / 4)
    expected = expected if shape[0] < shape[1] else expected.T
    assert error(update(Shampoo, gradient, torch.float64), expected / np.linalg.norm(expected)) < 1e-6
