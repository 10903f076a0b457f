"""What the environment says about the processes that train together. Without torch."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from pipelines.errors import UsageError

_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """A process among those of a run: the `rank`-th (from 0) of `size`, on this machine the `local_rank`-th."""

    rank: int
    size: int
    local_rank: int
    by_torchrun: bool

    @property
    def on_one_machine(self) -> bool:
        """Whether all processes are on this machine, as torchrun says it."""
        return self.by_torchrun and os.environ.get("LOCAL_WORLD_SIZE") == str(self.size)

    def __str__(self) -> str:
        return f"process {self.rank} of {self.size} ({socket.gethostname()})"


def launched() -> Place | None:
    """This process's place; None for one that trains alone.

    Torchrun sets all the variables that count. Other launchers (srun and mpirun in a wrapper, Kubernetes) set RANK,
    WORLD_SIZE, MASTER_ADDR and MASTER_PORT. What a cluster or a shell sets besides, such as RANK alone or a WORLD_SIZE
    of 1, is not a reason to wait for others.

    Raises:
        UsageError: several processes are meant, but the variables do not say which this is or where they meet.
    """
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if not os.environ.get("RANK") or not os.environ.get("WORLD_SIZE"):
        return None
    size = _number("WORLD_SIZE")
    if size == 1 and not by_torchrun:
        return None
    rank = _number("RANK")
    missing = [name for name in _ADDRESS if not os.environ.get(name)]
    given = f"RANK={rank} and WORLD_SIZE={size} are set"
    if missing:
        raise UsageError(f"{given}, but not {' and '.join(missing)}: set them too, or unset RANK to train alone")
    if rank >= size:
        raise UsageError(f"{given}: the processes count from 0 to {size - 1}; unset RANK to train alone")
    _number("MASTER_PORT")
    return Place(rank, size, _number("LOCAL_RANK", "0"), by_torchrun)


def local_rank() -> int:
    """Which process of this machine this is, and so which of its GPUs is its own."""
    place = launched()
    return 0 if place is None else place.local_rank


def _number(name: str, default: str = "") -> int:
    text = os.environ.get(name, default)
    if not text.isdecimal():
        raise UsageError(f"{name}={text}: is set, and not a number; unset RANK and WORLD_SIZE to train alone")
    return int(text)
