"""The size of an optimizer's state."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipelines.benchmarks.peers import parse_choice
from pipelines.benchmarks.shapes import Matrices
from pipelines.benchmarks.turns import state_bytes

SHAPES = {"wide": (32, 48), "tall": (48, 32), "same": (32, 48)}
PARAMETERS = 3 * 32 * 48
COLUMNS = 48 + 32 + 48
SCALARS = 64  # a parameter's count of steps and the like


def stepped(name: str) -> list[torch.optim.Optimizer]:
    """An optimizer after its first step, which creates the state."""
    model = Matrices(SHAPES)
    optimizers = parse_choice(name).build(model)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    for optimizer in optimizers:
        optimizer.step()
    return optimizers


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("torch.AdamW:fused=true", 8 * PARAMETERS),
        ("torch.AdamW:foreach=true", 8 * PARAMETERS),
        ("torch.SGD:momentum=0.9", 4 * PARAMETERS),
        ("accasro", 17 * PARAMETERS),
        ("asro", 12 * PARAMETERS),
        ("dasgo", 4 * PARAMETERS + 4 * COLUMNS),
        ("muon", 4 * PARAMETERS),
        ("torch.Muon", 4 * PARAMETERS),
        ("asgo", 4 * PARAMETERS + 3 * 4 * 32**2),
        ("shampoo", 8 * PARAMETERS + 3 * 4 * (32**2 + 48**2)),
    ],
)
def test_the_state_has_the_size_of_its_tensors(name: str, expected: int) -> None:
    assert expected <= state_bytes(stepped(name)) <= expected + SCALARS * len(SHAPES)


class Hoarder(torch.optim.Optimizer):
    """Keeps what it is given as its state."""

    def __init__(self, param: torch.nn.Parameter, **state: Any) -> None:
        super().__init__([param], {})
        self.state[param] = state


def test_a_storage_counts_once_and_whole() -> None:
    stack = torch.zeros(10, 4)
    param = torch.nn.Parameter(torch.zeros(4))
    views = Hoarder(param, first=stack[0], second=stack[1])
    other = Hoarder(param, again={"nested": [stack[2], (torch.zeros(3, dtype=torch.int8), "text", 5)]})
    assert state_bytes([views, other]) == 10 * 4 * 4 + 3


def test_weights_and_gradients_in_a_state_are_not_its_own() -> None:
    param = torch.nn.Parameter(torch.zeros(4))
    param.grad = torch.ones(4)
    assert state_bytes([Hoarder(param, anchor=param.detach(), last=param.grad, own=torch.zeros(2))]) == 8
