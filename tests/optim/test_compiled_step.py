"""`torch.compile` around a step, alone or with forward and backward, changes no number and soon compiles no more."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optim import Asro, elementwise
from optim.rows import update_rows
from tests.long import long

from .cases import DESCRIPTIONS, Description, every_optimizer
from .steps import weights

WARM_UP, STEPS = 4, 10
CLOSE = {"rtol": 1e-8, "atol": 1e-10}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before, nothing left behind."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def compiled_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def new_training(case: Description, **keywords: Any) -> tuple[torch.optim.Optimizer, Callable[[], Tensor]]:
    """An optimizer of hidden matrices and of a bias (for a matrix optimizer: under its fallback), and its loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 5)).double()
    inputs, targets = torch.randn(16, 6).double(), torch.randn(16, 5).double()
    others = {"params": [model[2].bias], **({"rule": "adam"} if case.matrix else {})}
    groups = [{"params": [model[0].weight, model[2].weight]}, others]
    return case.build(groups, **keywords), lambda: nn.functional.mse_loss(model(inputs), targets)


def whole_step(optimizer: torch.optim.Optimizer, loss_of: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def step() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def set_rate(optimizer: torch.optim.Optimizer, step: int) -> None:
    """A new learning rate at every step, as schedules set it."""
    for group in optimizer.param_groups:
        lr = 0.1 / (1 + step)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def train(optimizer: torch.optim.Optimizer, step: Callable[[], Tensor]) -> tuple[list[Tensor], int]:
    """Losses, and how many graphs were compiled after the warm-up."""
    losses = []
    for index in range(STEPS):
        set_rate(optimizer, index)
        losses.append(step())
        if index == WARM_UP - 1:
            before = compiled_graphs()
    return losses, compiled_graphs() - before


def assert_same_training(case: Description, make_step: Any, **keywords: Any) -> None:
    """`make_step(optimizer, loss_of)` compiles something; it must train as the eager step does."""
    optimizer, loss_of = new_training(case, **keywords)
    expected, expected_loss_of = new_training(case, **keywords)
    losses, compiled_late = train(optimizer, make_step(optimizer, loss_of))
    expected_losses, _ = train(expected, whole_step(expected, expected_loss_of))
    torch.testing.assert_close(losses, expected_losses, **CLOSE)
    torch.testing.assert_close(weights(optimizer), weights(expected), **CLOSE)
    assert losses[-1] < losses[0]
    assert compiled_late == 0


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@every_optimizer
def test_a_compiled_step_is_the_step(case, tensor_lr):
    def compiled_step(optimizer: torch.optim.Optimizer, loss_of: Callable[[], Tensor]) -> Callable[[], Tensor]:
        compiled = torch.compile(optimizer.step, backend="aot_eager")

        def step() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of()
            loss.backward()
            compiled()
            return loss.detach()

        return step

    lr = torch.tensor(0.1, dtype=torch.float64) if tensor_lr else 0.1
    assert_same_training(case, compiled_step, lr=lr)


@every_optimizer
def test_forward_backward_and_step_compile_as_one_function(case):
    def compiled(optimizer: torch.optim.Optimizer, loss_of: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return torch.compile(whole_step(optimizer, loss_of), backend="aot_eager")

    assert_same_training(case, compiled)
    assert compiled_graphs() >= 1


@long
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@every_optimizer
def test_the_default_compiler_agrees(case):
    def compiled(optimizer: torch.optim.Optimizer, loss_of: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return torch.compile(whole_step(optimizer, loss_of))

    assert_same_training(case, compiled)
    assert compiled_graphs() >= 1


@pytest.mark.parametrize("case", [c for c in DESCRIPTIONS if "precond_frequency" in c.overrides], ids=lambda c: c.name)
def test_a_compiled_step_refreshes_its_roots_on_schedule(case):
    def compiled(optimizer: torch.optim.Optimizer, loss_of: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return torch.compile(whole_step(optimizer, loss_of), backend="aot_eager")

    assert_same_training(case, compiled, precond_frequency=2)


def test_more_shapes_than_the_compiler_takes_are_stepped_without_it(monkeypatch):
    """The ninth graph is refused. Its group is stepped all the same, as by PyTorch operations."""

    def compiled(update: Any) -> Any:
        return torch.compile(functools.partial(update_rows, update), fullgraph=True, dynamic=False, backend="eager")

    def run(self: Any, rows: Any, scalars: Any) -> None:
        if not elementwise.run_compiled(type(self).update, rows, scalars):
            update_rows(type(self).update, rows, scalars)

    def stepped() -> list[Tensor]:
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(4, 4 + index)) for index in range(10)]
        optimizer = Asro([{"params": [param]} for param in params], lr=1e-3, decrement=0.1, min_scale=0.1)
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        return params

    expected = stepped()
    monkeypatch.setattr(elementwise, "_graphs", {})
    monkeypatch.setattr(elementwise, "_compile", compiled)
    monkeypatch.setattr(elementwise.ElementwiseOptimizer, "_run", run)
    with pytest.warns(UserWarning, match="is not compiled"):
        found = stepped()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
