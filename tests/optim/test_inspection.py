"""What is told of an optimizer's state, against numpy on the same state or on the gradients that made it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from optim import ASGO, AccAsro, Asro, Shampoo
from optim.inspection import SCALE_BINS, preconditioner_spectra, scale_distributions, scale_edges
from tests.optim import reference

EPS = np.finfo(np.float32).eps


def stepped(optimizer: torch.optim.Optimizer, steps: int = 5, size: float = 1.0) -> list[list[np.ndarray[Any, Any]]]:
    """Take steps on random gradients; returns them, a list a parameter."""
    random = torch.Generator().manual_seed(0)
    params: list[Tensor] = [param for group in optimizer.param_groups for param in group["params"]]
    gradients: list[list[np.ndarray[Any, Any]]] = [[] for _ in params]
    for _ in range(steps):
        for param, own in zip(params, gradients, strict=True):
            param.grad = size * torch.randn(param.shape, generator=random)
            own.append(param.grad.double().numpy())
        optimizer.step()
    return gradients


def accasro(**keywords: Any) -> AccAsro:
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in [(40, 30), (50,)]]
    settings = {"increment": 0.3, "decrement": 0.8, "max_scale": 3.0, "min_scale": 0.2, "total_steps": 20, **keywords}
    return AccAsro(params, lr=1e-3, **settings)


def test_scales_are_counted_as_numpy_counts_them() -> None:
    optimizer = accasro(increment=1.5)
    stepped(optimizer, steps=15)
    edges = scale_edges(optimizer)
    assert edges is not None
    assert (edges[0], edges[-1]) == pytest.approx((0.2, 3.0))
    np.testing.assert_allclose(np.diff(np.log(edges)), np.log(3.0 / 0.2) / SCALE_BINS)
    for param, found in scale_distributions(optimizer).items():
        scale = optimizer.state[param]["scale"].double().numpy().ravel()
        assert found.mean == pytest.approx(scale.mean(), rel=1e-6)
        assert found.at_min == (scale == np.float32(0.2)).mean() > 0
        assert found.at_max == (scale == np.float32(3.0)).mean() > 0
        inside = np.clip(scale, edges[0] * (1 + 1e-6), edges[-1] * (1 - 1e-6))
        assert found.histogram == np.histogram(inside, edges)[0].tolist()


@pytest.mark.parametrize("low", [0.0, 3.0], ids=["a smallest scale of 0", "a smallest that is the largest"])
def test_bins_stay_apart_without_a_range(low: float) -> None:
    optimizer = accasro(min_scale=low, decrement=5.0)
    stepped(optimizer)
    edges = scale_edges(optimizer)
    assert edges is not None
    assert (edges[0], edges[-1]) == pytest.approx((3e-4, 3.0))
    for param, found in scale_distributions(optimizer).items():
        scale = optimizer.state[param]["scale"]
        assert sum(found.histogram) == param.numel()
        assert found.histogram[0] == int((scale == 0).sum())
        assert found.histogram[-1] >= int((scale == 3.0).sum())
        assert (found.histogram[0] > 0) == (low == 0.0)


def test_scales_beyond_the_clamps_count_to_the_last_bin() -> None:
    """Before `scale_start_step` all are 1, wherever the clamps are."""
    optimizer = accasro(max_scale=0.5, scale_start_step=10)
    stepped(optimizer, steps=1)
    for param, found in scale_distributions(optimizer).items():
        assert (found.at_min, found.at_max, found.histogram[-1]) == (0.0, 1.0, param.numel())


def test_the_largest_scale_of_asro_is_one() -> None:
    optimizer = Asro([torch.nn.Parameter(torch.zeros(40, 30))], lr=1e-3, decrement=0.2, min_scale=0.01)
    stepped(optimizer, steps=3)
    (found,) = scale_distributions(optimizer).values()
    assert scale_edges(optimizer)[-1] == pytest.approx(1.0)  # type: ignore[index]
    (state,) = optimizer.state.values()
    assert 0 < found.at_max == (state["scale"] == 1).double().mean().item() < 1


def test_eigenvalues_are_those_of_the_averaged_products_of_gradients() -> None:
    """Wide, tall, and a convolution; without rounding, in float64, from the gradients alone."""
    shapes = [(6, 20), (25, 7), (5, 2, 2, 2)]
    optimizer = ASGO([torch.nn.Parameter(torch.zeros(shape)) for shape in shapes])
    gradients = stepped(optimizer)
    spectra = preconditioner_spectra(optimizer)
    for (param, found), own in zip(spectra.items(), gradients, strict=True):
        expected = reference.ASGO(np.zeros(param.shape))
        for gradient in own:
            expected.step(gradient)
        eigenvalues = np.linalg.eigvalsh(expected.V)
        spectrum = found["preconditioner"]
        assert (spectrum.side, spectrum.rank) == (len(eigenvalues), len(eigenvalues))
        assert spectrum.largest == pytest.approx(eigenvalues[-1], rel=1e-5)
        assert spectrum.smallest == pytest.approx(eigenvalues[0], rel=1e-4)
        assert spectrum.condition == pytest.approx(eigenvalues[-1] / eigenvalues[0], rel=1e-4)
        assert spectrum.largest_condition == spectrum.condition


def test_blocks_are_told_by_their_median_and_their_worst() -> None:
    """Each block of rows as if it were a parameter of its own."""
    blocks = [torch.nn.Parameter(torch.zeros(4, 10)) for _ in range(3)]
    apart = ASGO(blocks)
    gradients = stepped(apart)
    whole = torch.nn.Parameter(torch.zeros(12, 10))
    together = ASGO([{"params": [whole], "row_blocks": 3}])
    for parts in zip(*gradients, strict=True):
        whole.grad = torch.from_numpy(np.concatenate(parts)).float()
        together.step()
    found = preconditioner_spectra(together)[whole]["preconditioner"]
    own = [spectra["preconditioner"] for spectra in preconditioner_spectra(apart).values()]
    conditions = sorted(spectrum.condition for spectrum in own)
    assert found.side == 4
    assert [found.condition, found.largest_condition] == pytest.approx(conditions[1:], rel=1e-6)
    assert found.largest == pytest.approx(max(spectrum.largest for spectrum in own), rel=1e-6)
    assert found.smallest == pytest.approx(min(spectrum.smallest for spectrum in own), rel=1e-6)


def test_shampoo_tells_of_both_sides() -> None:
    optimizer = Shampoo([torch.nn.Parameter(torch.zeros(4, 9))], beta2=0.5)
    ((first, second),) = stepped(optimizer, steps=2)
    (found,) = preconditioner_spectra(optimizer).values()
    assert (found["short_factor"].side, found["long_factor"].side) == (4, 9)
    for key, left, right in [("short_factor", first, second), ("long_factor", first.T, second.T)]:
        eigenvalues = np.linalg.eigvalsh(0.25 * left @ left.T + 0.5 * right @ right.T)
        assert found[key].largest == pytest.approx(eigenvalues[-1], rel=1e-5)
        assert found[key].rank == (eigenvalues > EPS * eigenvalues[-1]).sum()
    assert found["long_factor"].rank == 8  # of two gradients of rank 4


def test_a_matrix_without_full_rank_is_singular() -> None:
    weight = torch.nn.Parameter(torch.zeros(5, 8))
    optimizer = ASGO([weight])
    weight.grad = torch.arange(5.0)[:, None] @ torch.ones(1, 8)
    optimizer.step()
    found = preconditioner_spectra(optimizer)[weight]["preconditioner"]
    assert (found.rank, found.condition) == (1, np.inf)
    assert found.largest == pytest.approx(0.2 * 8 * 30)


def test_eigenvalues_are_in_units_of_the_gradient() -> None:
    """Though the state keeps them divided by a scale: no float32 holds 1e50."""
    optimizer = ASGO([torch.nn.Parameter(torch.zeros(4, 6))])
    small = ASGO([torch.nn.Parameter(torch.zeros(4, 6))])
    stepped(optimizer, size=1e25)
    stepped(small)
    (huge,), (usual,) = preconditioner_spectra(optimizer).values(), preconditioner_spectra(small).values()
    assert huge["preconditioner"].largest == pytest.approx(1e50 * usual["preconditioner"].largest, rel=1e-5)
    assert huge["preconditioner"].condition == pytest.approx(usual["preconditioner"].condition, rel=1e-4)


def test_eigenvalues_where_the_decomposition_of_a_stack_fails(monkeypatch) -> None:
    optimizer = ASGO([torch.nn.Parameter(torch.zeros(4, 6)) for _ in range(2)])
    stepped(optimizer)
    expected = [found["preconditioner"].largest for found in preconditioner_spectra(optimizer).values()]

    def fail(matrices: torch.Tensor) -> None:
        raise torch.linalg.LinAlgError("The algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigvalsh", fail)
    found = [found["preconditioner"].largest for found in preconditioner_spectra(optimizer).values()]
    assert found == pytest.approx(expected, rel=1e-9)


def test_what_has_no_such_state_is_left_out() -> None:
    matrix, vector, unused = (torch.nn.Parameter(torch.zeros(shape)) for shape in [(3, 4), (4,), (3, 4)])
    asgo = ASGO([{"params": [matrix, unused]}, {"params": [vector], "rule": "adam"}])
    matrix.grad, vector.grad = torch.ones(3, 4), torch.ones(4)
    asgo.step()
    assert list(preconditioner_spectra(asgo)) == [matrix]
    assert (scale_edges(asgo), scale_distributions(asgo)) == (None, {})
    adam = torch.optim.AdamW([matrix])
    adam.step()
    assert (preconditioner_spectra(adam), scale_distributions(adam)) == ({}, {})
    assert scale_distributions(accasro()) == {}
