"""On a GPU the optimizers take the same steps as on the CPU, up to the precision of their roots."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from optim import build_optimizer

pytestmark = pytest.mark.gpu


SETTINGS: dict[str, dict[str, Any]] = {
    "asgo": {},
    "dasgo": {},
    "muon": {},
    "shampoo": {},
    "asro": {"lr": 1e-2, "decrement": 0.1, "min_scale": 0.1},
    "accasro": {"lr": 1e-2, "increment": 0.1, "decrement": 0.1, "max_scale": 2.0, "min_scale": 0.1},
}
# Muon computes in bfloat16 there; the others' roots are iterations in float32.
TOLERANCE = {"muon": 5e-2, "asgo": 2e-2, "shampoo": 2e-2}


def updates(name: str, device: str) -> list[torch.Tensor]:
    """The change of every weight of a small model after three steps with the same gradients."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 48), torch.nn.Linear(48, 24), torch.nn.Linear(24, 8)).to(device)
    before = [param.detach().clone() for param in model.parameters()]
    optimizer = build_optimizer(model, name, 3, **SETTINGS[name])
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator).to(device)
        optimizer.step()
    return [(param - old).detach().cpu() for param, old in zip(model.parameters(), before, strict=True)]


@pytest.mark.parametrize("name", SETTINGS)
def test_updates_agree_with_the_cpu(name: str) -> None:
    for ours, expected in zip(updates(name, "cuda"), updates(name, "cpu"), strict=True):
        error = torch.linalg.vector_norm(ours - expected) / torch.linalg.vector_norm(expected)
        assert error < TOLERANCE.get(name, 1e-4)


def test_a_root_that_is_not_finite_is_reported_once_it_has_arrived() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)).cuda()
    optimizer = build_optimizer(model, "asgo", 10)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            for param in model.parameters():
                param.grad = torch.full_like(param, 1e30)
            optimizer.step()
            torch.cuda.synchronize()
    assert len(caught) == 1
    assert "0.weight" in str(caught[0].message)
