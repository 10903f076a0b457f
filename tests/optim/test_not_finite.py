"""An inverse root that is not finite: the identity takes its place, the others are untouched, the user is told once."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from optim import ASGO, Shampoo

from . import reference
from .cases import full_rank, parameter, set_gradient, start

SHAPE = (6, 8)
GRADIENT = full_rank(SHAPE)[0]


def with_norm(update: np.ndarray, norm: float) -> np.ndarray:
    return update * norm / np.linalg.norm(update)


def break_factors(optimizer: torch.optim.Optimizer, param: torch.nn.Parameter, value: float = float("nan")) -> None:
    """Overwrite the parameter's preconditioners, as a broken checkpoint or memory would."""
    if param not in optimizer.state:
        set_gradient(param, np.zeros(param.shape))
        optimizer.step()
    for key, tensor in optimizer.state[param].items():
        if key.endswith(("preconditioner", "factor")):
            tensor[0, 0] = value


def steps(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], gradients: list[np.ndarray]) -> list[str]:
    """One step with a gradient a parameter; returns the warnings."""
    for param, gradient in zip(params, gradients, strict=True):
        set_gradient(param, gradient)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("root_method", ["auto", "eigh", "polar_express", "newton_schulz", "newton"])
def test_asgo_takes_the_identity_for_a_root_that_is_not_finite(root_method, value):
    param = parameter(start(SHAPE), torch.float32)
    optimizer = ASGO([("layer.weight", param)], lr=0.1, weight_decay=0.0, root_method=root_method)
    break_factors(optimizer, param, value)
    messages = steps(optimizer, [param], [GRADIENT])
    expected = start(SHAPE) - 0.1 * with_norm(GRADIENT, 0.2 * np.sqrt(48))
    # An update of about 0.02 an element in float32, of a few operations: 1e-8 is left of it
    np.testing.assert_allclose(param.detach().numpy(), expected, rtol=1e-6, atol=1e-7)
    assert len(messages) == 1
    assert "layer.weight" in messages[0]


def test_shampoo_takes_the_identity_for_both_roots_and_keeps_adams_length():
    param = parameter(start(SHAPE), torch.float32)
    optimizer = Shampoo([("layer.weight", param)], lr=0.1, weight_decay=0.0)
    break_factors(optimizer, param)
    signs = np.sign(GRADIENT)
    messages = steps(optimizer, [param], [signs])
    # all squares are equal, so Adam's step is 0.1 sign(G) / √0.001, and so is its length
    expected = start(SHAPE) - 0.1 * 0.1 / np.sqrt(0.001) * signs
    np.testing.assert_allclose(param.detach().numpy(), expected, rtol=1e-3, atol=1e-4)
    assert len(messages) == 1
    assert "layer.weight" in messages[0]


@pytest.mark.parametrize("precond_frequency", [1, 2])
@pytest.mark.parametrize("optimizer_class", [ASGO, Shampoo])
def test_the_warning_comes_once(optimizer_class, precond_frequency):
    param = parameter(start(SHAPE), torch.float32)
    optimizer = optimizer_class([("w", param)], precond_frequency=precond_frequency)
    break_factors(optimizer, param)
    messages = [message for _ in range(5) for message in steps(optimizer, [param], [GRADIENT])]
    assert len(messages) == 1
    for gradient in full_rank(SHAPE, 3):
        messages += steps(optimizer, [param], [gradient])
    assert len(messages) == 1


@pytest.mark.parametrize("optimizer_class", [ASGO, Shampoo])
def test_every_parameter_in_trouble_is_named(optimizer_class):
    params = [parameter(start(SHAPE), torch.float32) for _ in range(3)]
    optimizer = optimizer_class(zip(("one", "two", "three"), params, strict=True))
    gradients = [GRADIENT] * 3
    steps(optimizer, params, gradients)
    for param in (params[0], params[2]):
        break_factors(optimizer, param)
    messages = " ".join(steps(optimizer, params, gradients) + steps(optimizer, params, gradients))
    assert (messages.count("one"), messages.count("two"), messages.count("three")) == (1, 0, 1)


@pytest.mark.parametrize("root_method", ["eigh", "polar_express", "newton_schulz", "newton"])
def test_a_parameter_of_equal_shape_is_not_disturbed(root_method):
    """Equal shapes may be computed as one stack: one bad matrix must not spoil its neighbours."""
    bad, good = (parameter(start(SHAPE, seed), torch.float32) for seed in (1, 2))
    refer = reference.ASGO(good.detach().numpy(), lr=0.1)
    optimizer = ASGO([("bad", bad), ("good", good)], lr=0.1, root_method=root_method)
    break_factors(optimizer, bad)
    for gradient in full_rank(SHAPE):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            steps(optimizer, [bad, good], [gradient, gradient])
        refer.step(gradient)
    np.testing.assert_allclose(good.detach().numpy(), refer.parameter, rtol=1e-4, atol=1e-5)
    assert torch.isfinite(bad).all()


@pytest.mark.parametrize("keywords", [{}, {"root_method": "eigh"}, {"precond_frequency": 2}], ids=str)
@pytest.mark.parametrize("optimizer_class", [ASGO, Shampoo])
def test_no_error_of_a_decomposition_leaves_the_step(optimizer_class, keywords, monkeypatch):
    if optimizer_class is Shampoo and "root_method" in keywords:
        pytest.skip("Shampoo has no choice of method")

    def fail(matrix: torch.Tensor) -> None:
        raise torch.linalg.LinAlgError("The algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    monkeypatch.setattr(torch.linalg, "svd", fail)
    param = parameter(start(SHAPE), torch.float32)
    optimizer = optimizer_class([("layer.weight", param)], lr=0.1, weight_decay=0.0, **keywords)
    messages = [message for _ in range(3) for message in steps(optimizer, [param], [GRADIENT])]
    moved = param.detach().numpy() - start(SHAPE)
    np.testing.assert_allclose(with_norm(moved, 1), with_norm(-GRADIENT, 1), atol=1e-5)  # the identity's direction
    assert [message.count("layer.weight") for message in messages] == [1]


@pytest.mark.parametrize("optimizer_class", [ASGO, Shampoo])
def test_finite_roots_warn_of_nothing(optimizer_class, recwarn):
    param = parameter(start(SHAPE), torch.float32)
    optimizer = optimizer_class([param])
    for gradient in [np.zeros(SHAPE), *full_rank(SHAPE), 1e20 * full_rank(SHAPE)[0], 1e-20 * full_rank(SHAPE)[0]]:
        set_gradient(param, gradient)
        optimizer.step()
    assert not recwarn.list
    assert torch.isfinite(param).all()
