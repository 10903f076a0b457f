"""Read the process group from the environment variables of a launcher. Does not import torch."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from pipelines.errors import UsageError

_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """Rank of this process (from 0) among `size`, and `local_rank` among those on this machine."""

    rank: int
    size: int
    local_rank: int
    by_torchrun: bool

    @property
    def on_one_machine(self) -> bool:
        """Whether all processes are on this machine. Known only from torchrun."""
        return self.by_torchrun and os.environ.get("LOCAL_WORLD_SIZE") == str(self.size)

    @property
    def launcher_keeps_store(self) -> bool:
        """Whether the launcher keeps the store of the process group. With other launchers, rank 0 does."""
        return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"

    def __str__(self) -> str:
        return f"process {self.rank} of {self.size} ({socket.gethostname()})"


def launched() -> Place | None:
    """Return this process's place in the process group; None for a single process.

    Torchrun sets all variables. Other launchers (wrappers of srun and mpirun, Kubernetes) set RANK, WORLD_SIZE,
    MASTER_ADDR and MASTER_PORT. Clusters and shells may set RANK alone, or a WORLD_SIZE of 1: that is a single process.

    Raises:
        UsageError: the variables are for several processes, but some are missing or contradict each other.
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
        raise UsageError(f"{given}, but ranks are 0 to {size - 1}; unset RANK to train alone")
    _number("MASTER_PORT")
    return Place(rank, size, _number("LOCAL_RANK", "0"), by_torchrun)


def local_rank() -> int:
    """Return the local rank, which is also the index of this process's GPU."""
    place = launched()
    return 0 if place is None else place.local_rank


def _number(name: str, default: str = "") -> int:
    text = os.environ.get(name, default)
    if not text.isdecimal():
        raise UsageError(f"{name}={text}: not a number; unset RANK and WORLD_SIZE to train alone")
    return int(text)
