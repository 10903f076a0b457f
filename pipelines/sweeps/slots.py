"""Slots of a sweep: each runs one process at a time, on one GPU or a part of the cores."""

from __future__ import annotations

import os
from dataclasses import dataclass

from pipelines.errors import UsageError


@dataclass(frozen=True)
class Slot:
    """Resources of one run at a time."""

    threads: int
    gpu: str | None = None
    """Value of `CUDA_VISIBLE_DEVICES`."""

    def environment(self) -> dict[str, str]:
        """Return the environment variables of a run in this slot. A user's OMP_NUM_THREADS stays."""
        threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(self.threads)}
        return threads if self.gpu is None else {**threads, "CUDA_VISIBLE_DEVICES": self.gpu}


def make_slots(slots: int | None, gpus: int | None, on_gpus: bool) -> list[Slot]:
    """Return `slots` slots; by default one per GPU, or one without GPUs. More slots than GPUs share the GPUs.

    If `on_gpus`, the runs use the first `gpus` GPUs of this machine, all by default. Raises `UsageError` if there are
    fewer.
    """
    found = _visible_gpus() if on_gpus or gpus else []
    if gpus is not None and gpus > len(found):
        raise UsageError(
            f"--gpus {gpus}: this machine has {len(found) or 'no GPU that torch can use'}; --slots N needs no GPU"
        )
    used = found[:gpus]
    count = slots or len(used) or 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // count)
    return [Slot(threads, used[number % len(used)] if used else None) for number in range(count)]


def _visible_gpus() -> list[str]:
    """Return the GPUs of this process, by their names in `CUDA_VISIBLE_DEVICES`."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]
