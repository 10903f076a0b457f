"""The error of an update against float64."""

from __future__ import annotations

import pytest
import torch

from pipelines.benchmarks import float64_error as module
from pipelines.benchmarks.float64_error import float64_error
from pipelines.benchmarks.peers import Choice, parse_choice

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.SHAPES, "wide", (48, 64))
    monkeypatch.setitem(module.SHAPES, "tall", (64, 48))


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("asgo", 1e-7, 1e-3),
        ("asgo:root_method=eigh,precond_frequency=2,beta2=0.95,weight_decay=0.5", 1e-7, 1e-3),
        ("shampoo", 1e-7, 1e-3),
        ("shampoo:momentum=0.5,lr=0.02,beta2=0.9", 1e-7, 1e-3),
        ("shampoo:precond_frequency=3,eps=1e-6", 1e-7, 1e-3),
        ("muon", 1e-8, 3e-2),
        ("dasgo", 1e-9, 1e-5),
        ("asro", 1e-9, 1e-5),
        ("accasro", 1e-9, 1e-5),
        ("adamw", 1e-9, 1e-5),
        ("torch.AdamW:fused=true", 1e-9, 1e-5),
        ("torch.RAdam", 1e-9, 1e-5),
        ("torch.Muon", 1e-4, 4e-2),  # in bfloat16
        ("torch.Muon:momentum=0.5,nesterov=false,weight_decay=0.3", 1e-4, 4e-2),
    ],
)
def test_the_error_is_that_of_the_precision(name: str, least: float, most: float) -> None:
    error = float64_error(parse_choice(name), CPU)
    assert error is not None
    assert least < error < most


@pytest.mark.parametrize(
    "name", ["asgo:root_method=newton_schulz,root_steps=4", "asgo:root_method=polar_express,root_steps=3"]
)
def test_the_reference_of_asgo_is_exact_and_not_the_same_iteration(name: str) -> None:
    error = float64_error(parse_choice(name), CPU)
    assert error is not None
    assert error > 0.01


@pytest.mark.parametrize(
    "choice",
    [
        Choice("heavyball.SOAP", "heavyball", "SOAP", {}),
        Choice("heavyball.Muon", "heavyball", "Muon", {}),
        Choice("pytorch_optimizer.Lion", "pytorch_optimizer", "Lion", {}),
        Choice("heavyball.AdamW", "heavyball", "AdamW", {}),
        Choice("pytorch_optimizer.AdamW:cautious=true", "pytorch_optimizer", "AdamW", {"cautious": True}),
        Choice("torch.Muon:eps=1e-3", "torch", "Muon", {"eps": 1e-3}),
    ],
    ids=lambda choice: choice.name,
)
def test_there_is_none_without_a_fair_reference(choice: Choice) -> None:
    assert float64_error(choice, CPU) is None


@pytest.mark.parametrize(("name", "most"), [("AdamW", 1e-5), ("Muon", 4e-2)])
def test_the_peers_of_pytorch_optimizer_have_references(name: str, most: float) -> None:
    pytest.importorskip("pytorch_optimizer")
    error = float64_error(parse_choice(f"pytorch_optimizer.{name}"), CPU)
    assert error is not None
    assert 0 < error < most


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "most"), [("asgo", 1e-3), ("shampoo", 1e-3), ("muon", 3e-2)])
def test_the_marks_hold_on_a_gpu(name: str, most: float) -> None:
    error = float64_error(parse_choice(name), torch.device("cuda"))
    assert error is not None
    assert error <= most
