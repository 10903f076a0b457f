"""States of the random number generators of all ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from pipelines.training.distributed import Ranks

Tensors = dict[str, Tensor]


def random_state(device: torch.device) -> Tensors:
    """Return the states of this process's generators, by device type."""
    state = {"cpu": torch.get_rng_state()}
    if device.type in ("cuda", "mps"):
        state[device.type] = getattr(torch, device.type).get_rng_state()
    return state


@contextlib.contextmanager
def restored_random_state(device: torch.device) -> Iterator[None]:
    """Context manager after which the generators of this process are as before."""
    state = random_state(device)
    try:
        yield
    finally:
        set_random_state(state)


def gather_random_states(device: torch.device, ranks: Ranks) -> list[Tensors]:
    """Gather the states of all ranks. A collective: every rank must call it."""
    gathered = {key: ranks.gather(state) for key, state in random_state(device).items()}
    return [{key: states[rank] for key, states in gathered.items()} for rank in range(ranks.size)]


def set_random_state(state: Tensors) -> None:
    """Restore what `random_state` returned, for the devices that this machine has."""
    torch.set_rng_state(state["cpu"])
    for kind in ("cuda", "mps"):
        if kind in state and getattr(torch, kind).is_available():
            getattr(torch, kind).set_rng_state(state[kind])
