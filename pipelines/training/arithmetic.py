"""What a run computes with: torch, device, instruction set, kernels. Equal on all ranks, recorded in checkpoints.

Another torch, instruction set, number of threads or kernel rounds the same formulas differently.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import torch

from optim import native
from optim.matrix_functions import bfloat16_on_cpu, use_bfloat16_on_cpu
from pipelines.config import RuntimeSettings
from pipelines.training.device import compiles, describe_device
from pipelines.training.distributed import Ranks

Arithmetic = dict[str, str]

COMPILER = "torch.compile"
_KERNEL = "optimizer"
_PRODUCTS = "orthogonalization"
_OPERATIONS = "PyTorch operations"
_RECORD_BYTES = 1024


def agree_on_arithmetic(
    optimizer: torch.optim.Optimizer,
    runtime: RuntimeSettings,
    device: torch.device,
    ranks: Ranks,
    note: Callable[[str], None],
) -> Arithmetic:
    """Use C kernels, and bfloat16 for Muon on a CPU, on all ranks or on none; returns what this rank computes with.

    Replicas of a model would drift apart if one rank had a compiler and another did not. Calls `note` if the kernels
    cannot be used, and for what still differs between ranks. A collective: every rank must call it.
    """
    native.use(True)
    use_bfloat16_on_cpu(None)
    takes_kernels = device.type == "cpu" and _takes_kernels(optimizer)
    local = {
        "torch": torch.__version__,
        "device": describe_device(device),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        COMPILER: "on" if compiles(runtime, device) else "off",
        _KERNEL: native.description() if takes_kernels else _OPERATIONS,
        _PRODUCTS: "bfloat16" if device.type != "cpu" or bfloat16_on_cpu() else "float32",
    }
    of_ranks = _gather(local, ranks)
    if any(record[_PRODUCTS] == "float32" for record in of_ranks):
        use_bfloat16_on_cpu(False)
        local[_PRODUCTS] = "float32"
    if not getattr(optimizer, "orthogonalizes", False):
        del local[_PRODUCTS]
    without = [record[_KERNEL] for record in of_ranks if record[_KERNEL].startswith(_OPERATIONS)]
    if without:
        native.use(False)
        local[_KERNEL] = _OPERATIONS
    if without and takes_kernels and ranks.is_first:
        note(f"the optimizer runs as {without[0]}, 2 to 4 times slower than compiled")
    for key in local.keys() - {_KERNEL, _PRODUCTS}:
        values = sorted({record[key] for record in of_ranks})
        if len(values) > 1 and ranks.is_first:
            note(f"the processes compute with different {key} ({', '.join(values)}): replicas differ by rounding")
    return local


def differences_in_arithmetic(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Return a warning about what a resumed run computes with now and did not before; empty if nothing differs."""
    changed = [
        f"{key}: {before[key]} before, {value} now" for key, value in now.items() if before.get(key, value) != value
    ]
    if not changed:
        return ""
    return f"resumed, but not bit for bit: rounding differs from here on ({'; '.join(changed)})"


def _takes_kernels(optimizer: torch.optim.Optimizer) -> bool:
    elements = sum(param.numel() for group in optimizer.param_groups for param in group["params"])
    return getattr(optimizer, "native_kernels", False) and elements >= native.WORTH_FROM


def _gather(record: Arithmetic, ranks: Ranks) -> list[Arithmetic]:
    """Gather the records of all ranks, as JSON padded to equal length: collectives need tensors of equal shape."""
    text = json.dumps({key: value[:100] for key, value in record.items()}).ljust(_RECORD_BYTES).encode()
    return [
        json.loads(bytes(gathered.tolist())) for gathered in ranks.gather(torch.tensor(list(text), dtype=torch.uint8))
    ]
