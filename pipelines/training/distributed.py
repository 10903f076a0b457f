"""The processes that train together: who they are, and what they tell each other. One alone is the same program."""

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
from torch.distributed import PrefixStore, Store, rendezvous  # type: ignore[attr-defined]

from pipelines.config import TrainingSettings
from pipelines.errors import AsgoError, RunInterrupted, UsageError
from pipelines.training.launched import launched

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run: the `rank`-th (from 0) of `size`, alone unless torchrun started more."""

    rank: int = 0
    size: int = 1
    store: Store | None = None
    """What the processes share besides their collectives; none where there is no process group."""

    @property
    def joined(self) -> bool:
        """Whether there is a process group; torchrun makes one of a single process too."""
        return self.store is not None

    @property
    def is_first(self) -> bool:
        """Whether this process speaks, and writes the run folder."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """This process's stretch of `range(count)`; the stretches of all differ in length by one at most."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of each element over the processes, in place; returns `values`."""
        if self.joined:
            dist.all_reduce(values)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """The mean of each element over the processes, in place; returns `values`."""
        return self.sum(values).div_(self.size)

    def any(self, flag: bool) -> bool:
        """Whether any process says so; the GPU is neither asked nor waited for."""
        return bool(self.sum(torch.tensor([int(flag)])).item()) if self.joined else flag

    def gather(self, values: Tensor) -> list[Tensor]:
        """The tensors of all processes, of one shape on the CPU, by rank."""
        if not self.joined:
            return [values]
        gathered = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(gathered, values)
        return gathered

    def first_does(self, work: Callable[[], Value]) -> Value:
        """What `work` returns in the first process, a JSON value, in every process; or the `AsgoError` that it raises.

        So that all processes end with the same error, instead of waiting for one that is gone.
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
    """A JSON value of the first process, in every process. As text: nothing here unpickles what a socket brings."""
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8) if is_first else torch.empty(0)
    length = torch.tensor([text.numel()])
    dist.broadcast(length, 0)
    if not is_first:
        text = torch.empty(int(length.item()), dtype=torch.uint8)
    dist.broadcast(text, 0)
    return json.loads(bytes(text.numpy()))


@contextlib.contextmanager
def joined_ranks(device: torch.device, timeout_s: float) -> Iterator[Ranks]:
    """Join the processes that a launcher started, if it did; they part at the end, unless that is an error.

    Tensors of a GPU travel by NCCL, those of a CPU by gloo. The backends wait for twice `timeout_s`, so that the
    watchdog, which knows whom they wait for, is first. Raises `AsgoError` when the others do not come.
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
        store, rank, size = next(rendezvous("env://", timeout=timeout))
        # Torchrun gives the processes that it starts again the store in which the lost ones left their addresses.
        store = PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(
            backend, store=PrefixStore("collectives", store), rank=rank, world_size=size, timeout=timeout
        )
    except (RuntimeError, ValueError) as error:
        raise AsgoError(f"the other processes of the run cannot be reached: {' '.join(str(error).split())}") from None
    try:
        yield Ranks(rank, size, PrefixStore("watchdog", store))
    except RunInterrupted:
        _part()
        raise
    # Not after an error: others may be gone or waiting, and NCCL would wait for them before the error could be told.
    _part()


def _stay_on_loopback() -> None:
    """Have the backends listen on no interface that others can reach, and ask for no address of this machine's name."""
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if loopback is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={loopback}")  # without "=", all whose name begins like this


def _part() -> None:
    """End the process group, which nothing else may hold then.

    A replica of DDP, kept alive by a cycle, would end it later and with Python's lock in its hands: forever, if one of
    gloo's threads, for which it waits, wants that lock to let go of a tensor.
    """
    gc.collect()
    dist.destroy_process_group()


def seed_of_rank(seed: int, rank: int, step: int = 0) -> int:
    """A seed for what a process draws on its own, such as dropout, from a step on."""
    return int(np.random.SeedSequence([seed, rank, step]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def rounds(count: int, rows: int, ranks: Ranks) -> Iterator[range]:
    """`range(count)` in as many parts for every process, of at most `rows`; parts may be empty in the last round."""
    for start in range(0, count, rows * ranks.size):
        part = ranks.share(min(rows * ranks.size, count - start))
        yield range(start + part.start, start + part.stop)


@dataclass(frozen=True)
class BatchShare:
    """The rows of every global batch that are one process's, and how many it takes in a forward pass."""

    rows: range
    micro_batch_size: int

    @property
    def parts(self) -> list[slice]:
        """The micro-batches, as slices of the global batch."""
        starts = range(self.rows.start, self.rows.stop, self.micro_batch_size)
        return [slice(start, start + self.micro_batch_size) for start in starts]


def batch_share(training: TrainingSettings, ranks: Ranks) -> BatchShare:
    """This process's share. Raises `UsageError` if the batch cannot be divided into equal ones."""
    rows = ranks.share(training.batch_size)
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
    return BatchShare(rows, micro_batch_size)
