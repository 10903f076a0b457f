"""What the numbers of a run are computed with: agreed between its processes, and recorded in its checkpoints.

The same formulas are rounded in another way by another torch, instruction set, number of threads, or kernel.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import torch

from optim import native
from pipelines.config import RuntimeSettings
from pipelines.training.device import describe_device
from pipelines.training.distributed import Ranks

Arithmetic = dict[str, str]

_KERNEL = "optimizer"
_OPERATIONS = "PyTorch operations"
_RECORD_BYTES = 1024


def agree_on_arithmetic(
    optimizer: torch.optim.Optimizer,
    runtime: RuntimeSettings,
    device: torch.device,
    ranks: Ranks,
    note: Callable[[str], None],
) -> Arithmetic:
    """Have all processes use the optimizer's kernels in C, or none; returns what this one computes with.

    Replicas of a model would drift apart if one process had a compiler and another had not. `note` is told of kernels
    that cannot be used, and of what differs between the processes all the same. An act of all processes together.
    """
    native.use(True)
    takes_kernels = device.type == "cpu" and _takes_kernels(optimizer)
    own = {
        "torch": torch.__version__,
        "device": describe_device(device),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch.compile": "on" if runtime.compile else "off",
        _KERNEL: native.description() if takes_kernels else _OPERATIONS,
    }
    of_ranks = _gather(own, ranks)
    without = [record[_KERNEL] for record in of_ranks if record[_KERNEL].startswith(_OPERATIONS)]
    if without:
        native.use(False)
        own[_KERNEL] = _OPERATIONS
    if without and takes_kernels and ranks.is_first:
        note(f"the optimizer runs as {without[0]}, 2 to 4 times slower than compiled")
    for key in own.keys() - {_KERNEL}:
        values = sorted({record[key] for record in of_ranks})
        if len(values) > 1 and ranks.is_first:
            note(f"the processes compute with different {key} ({', '.join(values)}): replicas differ by rounding")
    return own


def differences_in_arithmetic(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What a resumed run computes with that it did not before, in words; empty if nothing is known to differ."""
    changed = [
        f"{key}: {before[key]} before, {value} now" for key, value in now.items() if before.get(key, value) != value
    ]
    if not changed:
        return ""
    return f"resumed, but not bit for bit: other rounding from here on ({'; '.join(changed)})"


def _takes_kernels(optimizer: torch.optim.Optimizer) -> bool:
    elements = sum(param.numel() for group in optimizer.param_groups for param in group["params"])
    return getattr(optimizer, "native_kernels", False) and elements >= native.WORTH_FROM


def _gather(record: Arithmetic, ranks: Ranks) -> list[Arithmetic]:
    """The records of all processes, as text of one length."""
    text = json.dumps({key: value[:100] for key, value in record.items()}).ljust(_RECORD_BYTES).encode()
    return [
        json.loads(bytes(gathered.tolist())) for gathered in ranks.gather(torch.tensor(list(text), dtype=torch.uint8))
    ]
