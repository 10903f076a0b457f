"""How much memory the state of an optimizer takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def state_bytes(optimizers: Iterable[torch.optim.Optimizer]) -> int:
    """Bytes of all storages that the states of the optimizers hold.

    Tensors that share a storage count once, and weights and gradients that a state refers to not at all. Counts of
    steps that are tensors are counted.
    """
    optimizers = list(optimizers)
    params = [param for each in optimizers for group in each.param_groups for param in group["params"]]
    grads = [param.grad for param in params if param.grad is not None]
    not_state = {_key(tensor) for tensor in (*params, *grads)}
    sizes = {
        _key(tensor): tensor.untyped_storage().nbytes()
        for each in optimizers
        for state in each.state.values()
        for tensor in _tensors(state)
    }
    return sum(size for key, size in sizes.items() if key not in not_state)


def _key(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a state, whatever it nests them in."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
