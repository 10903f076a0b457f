"""Where the runs of a sweep compute: one run a slot, on one GPU or a share of the processor's cores."""

from __future__ import annotations

import os
from dataclasses import dataclass

from pipelines.errors import UsageError


@dataclass(frozen=True)
class Slot:
    """A place for one run at a time."""

    threads: int
    gpu: str | None = None
    """As `CUDA_VISIBLE_DEVICES` names it."""

    def environment(self) -> dict[str, str]:
        """The variables that keep a run in its slot; a number of threads that the user has set stays."""
        threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(self.threads)}
        return threads if self.gpu is None else {**threads, "CUDA_VISIBLE_DEVICES": self.gpu}


def make_slots(slots: int | None, gpus: int | None, on_gpus: bool) -> list[Slot]:
    """As many slots as asked for, else one a GPU, else one; several to a GPU where there are more slots than GPUs.

    `on_gpus` says whether the runs may compute on GPUs: then all of this machine's are used, or the first `gpus`.
    Raises `UsageError` if there are fewer.
    """
    found = _visible_gpus() if on_gpus or gpus else []
    if gpus is not None and gpus > len(found):
        raise UsageError(
            f"--gpus {gpus}: this machine has {len(found) or 'none that torch can use'}; --slots N needs none"
        )
    used = found[:gpus]
    count = slots or len(used) or 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // count)
    return [Slot(threads, used[number % len(used)] if used else None) for number in range(count)]


def _visible_gpus() -> list[str]:
    """The GPUs by the names that this process sees them under."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]
