"""Inverse roots that are computed at some steps only and kept in between."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from optim.base import State


def refreshed_roots(
    states: list[State],
    keys: dict[str, str],
    frequency: int,
    compute: Callable[[Tensor, list[int]], Tensor],
) -> list[Tensor]:
    """For each pair (factor key, root key), the roots of `state[factor key]` as a stack, shape (k, m, m).

    Counts `state["step"]`. A parameter's roots are computed at its steps 1, 1 + frequency, 1 + 2 frequency, ...; in
    between the state holds them. `compute` gets a stack of factors and the positions of their parameters.
    """
    due = []
    for index, state in enumerate(states):
        state["step"] += 1
        is_missing = any(root not in state for root in keys.values())
        if (int(state["step"]) - 1) % frequency == 0 or is_missing:
            due.append(index)
    return [_roots(states, factor, root, due, frequency, compute) for factor, root in keys.items()]


def _roots(
    states: list[State],
    factor_key: str,
    root_key: str,
    due: list[int],
    frequency: int,
    compute: Callable[[Tensor, list[int]], Tensor],
) -> Tensor:
    if not due:
        return torch.stack([state[root_key] for state in states])
    fresh = compute(torch.stack([states[index][factor_key] for index in due]), due)
    if frequency == 1:
        return fresh
    for index, root in zip(due, fresh, strict=True):
        states[index][root_key] = root.clone()
    return torch.stack([state[root_key] for state in states])
