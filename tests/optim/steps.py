"""Short trainings on given gradients, and when two optimizers are the same to the last bit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .cases import Description, noise, parameter, set_gradient, start

SHAPES = [(4, 3), (3, 4), (4, 3), (2, 3, 2, 2)]


def make_params(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[torch.nn.Parameter]:
    values = [parameter(start(shape, seed), dtype).detach() for seed, shape in enumerate(SHAPES)]
    return [torch.nn.Parameter(value.to(device)) for value in values]


def parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def weights(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param.detach() for param in parameters(optimizer)]


def copies(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    """New parameters with the weights of an optimizer's."""
    return [torch.nn.Parameter(weight.clone()) for weight in weights(optimizer)]


def with_fallback(case: Description, params: list[Any]) -> list[dict[str, Any]]:
    """Two groups; for a matrix optimizer the second takes its fallback rule."""
    return [{"params": params[:2]}, {"params": params[2:], **({"rule": "adam"} if case.matrix else {})}]


def set_gradients(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Gradients that depend on the step and the position alone; at every third step the third parameter lacks one."""
    for index, param in enumerate(parameters(optimizer)):
        missing = index == 2 and step % 3 == 0
        set_gradient(param, None if missing else noise(tuple(param.shape), 1, 100 * step + index)[0])


def run(optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    """Take the steps with those numbers."""
    for step in steps:
        set_gradients(optimizer, step)
        optimizer.step()


def assert_identical(left: torch.optim.Optimizer, right: torch.optim.Optimizer) -> None:
    """Weights and state are equal to the last bit, dtypes included."""
    for one, other in zip(weights(left), weights(right), strict=True):
        assert torch.equal(one, other)
    assert_states_identical(left.state_dict(), right.state_dict())


def assert_states_identical(left: dict[str, Any], right: dict[str, Any]) -> None:
    """The states of two state dicts are equal to the last bit, dtypes included."""
    assert left["state"].keys() == right["state"].keys()
    for index, entries in left["state"].items():
        assert entries.keys() == right["state"][index].keys()
        for key, value in entries.items():
            assert value.dtype == right["state"][index][key].dtype, key
            assert torch.equal(value, right["state"][index][key]), key
