"""The processes of a distributed run and their collectives. A single process runs the same code."""

from __future__ import annotations

import contextlib
import datetime
import gc
import json
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from pipelines.config import TrainingSettings
from pipelines.errors import AsgoError, RunInterrupted, UsageError
from pipelines.training.launched import launched

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """Rank and world size of this process; rank 0 of 1 unless a launcher started several."""

    rank: int = 0
    size: int = 1
    store: Store | None = None
    """The key-value store of the process group; None without a process group."""

    @property
    def joined(self) -> bool:
        """Whether there is a process group. Torchrun makes one for a single process too."""
        return self.store is not None

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which reports and writes the run folder."""
        return self.rank == 0

    def shard(self, count: int) -> range:
        """The part of `range(count)` that belongs to this rank. The lengths of two ranks differ by at most one."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum(self, values: Tensor) -> Tensor:
        """Sum each element over all ranks, in place; returns `values`."""
        if self.joined:
            dist.all_reduce(values)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """Average each element over all ranks, in place; returns `values`."""
        return self.sum(values).div_(self.size)

    def any(self, flag: bool) -> bool:
        """Whether the flag is true on any rank. Does not wait for the GPU."""
        return bool(self.sum(torch.tensor([int(flag)])).item()) if self.joined else flag

    def gather(self, values: Tensor) -> list[Tensor]:
        """Gather CPU tensors of equal shape from all ranks; the list is in the order of ranks."""
        if not self.joined:
            return [values]
        gathered = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(gathered, values)
        return gathered

    def on_rank_0(self, work: Callable[[], Value]) -> Value:
        """Call `work` on rank 0 and return its result, a JSON value, on every rank.

        An `AsgoError` that `work` raises is raised on every rank: all end with the same error, and none waits for a
        rank that has ended.
        """
        if not self.joined:
            return work()
        outcome: dict[str, Any] = {}
        if self.is_first:
            try:
                outcome = {"value": work()}
            except UsageError as error:
                outcome = {"usage_error": str(error)}
            except AsgoError as error:
                outcome = {"error": str(error)}
        outcome = _broadcast_json(outcome, self.is_first)
        if "usage_error" in outcome:
            raise UsageError(outcome["usage_error"])
        if "error" in outcome:
            raise AsgoError(outcome["error"])
        value: Value = outcome["value"]
        return value


ALONE = Ranks()


def _broadcast_json(value: Any, is_first: bool) -> Any:
    """Broadcast a JSON value from rank 0, as text. `broadcast_object_list` would unpickle what a socket brings."""
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8) if is_first else torch.empty(0)
    length = torch.tensor([text.numel()])
    dist.broadcast(length, 0)
    if not is_first:
        text = torch.empty(int(length.item()), dtype=torch.uint8)
    dist.broadcast(text, 0)
    return json.loads(bytes(text.numpy()))


@contextlib.contextmanager
def process_group(device: torch.device, timeout_s: float) -> Iterator[Ranks]:
    """Join the process group of the launcher, if there is one, and leave it at the end, unless an error is raised.

    NCCL moves tensors on a GPU, gloo those on a CPU. Both time out after twice `timeout_s`: the watchdog, which names
    the rank that hangs, comes first. Raises `AsgoError` if the other ranks cannot be reached.
    """
    place = launched()
    if place is None:
        yield ALONE
        return
    if place.on_one_machine:
        _stay_on_loopback()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(seconds=2 * timeout_s)
    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        keeps_store = place.rank == 0 and not place.launcher_keeps_store
        store: Store = TCPStore(*address, place.size, keeps_store, timeout)
        # After a restart, the launcher's store still holds the addresses of the lost processes.
        store = PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(
            backend, store=PrefixStore("collectives", store), rank=place.rank, world_size=place.size, timeout=timeout
        )
    except (RuntimeError, ValueError) as error:
        raise AsgoError(f"the other processes of the run cannot be reached: {' '.join(str(error).split())}") from None
    try:
        yield Ranks(place.rank, place.size, PrefixStore("watchdog", store))
    except RunInterrupted:
        _leave_process_group()
        raise
    # Not after an error: other ranks may be gone, and NCCL would wait for them before the error is reported.
    _leave_process_group()


def _stay_on_loopback() -> None:
    """Make gloo and NCCL listen on loopback only. They then do not resolve the host name either."""
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if loopback is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={loopback}")  # without "=", all whose name begins like this


def _leave_process_group() -> None:
    """Destroy the process group after everything that refers to it is collected.

    Trap: a DDP module in a reference cycle would destroy it later, while it holds the GIL. That is a deadlock if one of
    gloo's threads, which the destructor joins, needs the GIL to release a tensor.
    """
    gc.collect()
    dist.destroy_process_group()


def seed_of_rank(seed: int, rank: int, step: int = 0) -> int:
    """Seed of what a rank draws on its own, such as dropout, from a step on."""
    return int(np.random.SeedSequence([seed, rank, step]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def rounds(count: int, rows: int, ranks: Ranks) -> Iterator[range]:
    """Split `range(count)` among the ranks, in rounds of at most `rows` each.

    Every rank has as many rounds. Its range may be empty in the last one.
    """
    for start in range(0, count, rows * ranks.size):
        part = ranks.shard(min(rows * ranks.size, count - start))
        yield range(start + part.start, start + part.stop)


@dataclass(frozen=True)
class LocalBatch:
    """The rows of a global batch that belong to this rank, and the size of its micro-batches."""

    rows: range
    micro_batch_size: int

    @property
    def micro_batches(self) -> list[slice]:
        """The micro-batches, as slices of the global batch."""
        starts = range(self.rows.start, self.rows.stop, self.micro_batch_size)
        return [slice(start, start + self.micro_batch_size) for start in starts]


def local_batch(training: TrainingSettings, ranks: Ranks) -> LocalBatch:
    """The local batch of this rank. Raises `UsageError` if the global batch does not divide equally."""
    rows = ranks.shard(training.batch_size)
    micro_batch_size = training.micro_batch_size or len(rows)
    if training.batch_size % ranks.size:
        raise UsageError(
            f"training.batch_size={training.batch_size} cannot be divided equally among {ranks.size} processes"
        )
    if len(rows) % micro_batch_size:
        raise UsageError(
            f"training.micro_batch_size={micro_batch_size} does not divide the {len(rows)} samples that each of "
            f"{ranks.size} processes has of a batch of {training.batch_size}"
        )
    return LocalBatch(rows, micro_batch_size)


def largest_divisor(number: int, at_most: int) -> int:
    """Return the largest divisor of `number` up to `at_most`, for a size of micro-batches."""
    return next(divisor for divisor in range(min(number, at_most), 0, -1) if number % divisor == 0)
