"""Choose the device and the precision of a run."""

from __future__ import annotations

import contextlib
import os
import platform

import torch

from pipelines.config import RuntimeSettings, TrainingSettings
from pipelines.errors import UsageError
from pipelines.training.launched import launched, local_rank


def pick_device(runtime: RuntimeSettings) -> torch.device:
    """Return this process's device; `auto` takes the best one. Raises `UsageError` if the machine does not have it."""
    available = [name for name in ("cuda", "mps") if getattr(torch, name).is_available()] + ["cpu"]
    kind = available[0] if runtime.device == "auto" else runtime.device
    if kind not in available:
        raise UsageError(f"--device {kind}: not on this machine, which has {', '.join(available)}")
    if kind != "cuda":
        return torch.device(kind)
    if local_rank() >= torch.cuda.device_count():
        raise UsageError(f"{launched()} has no GPU: this machine has {torch.cuda.device_count()}")
    torch.cuda.set_device(local_rank())
    return torch.device("cuda", local_rank())


def pick_precision(training: TrainingSettings, device: torch.device) -> torch.dtype:
    """Return the dtype of the forward pass. `auto` is bfloat16 on a GPU that computes in it, else float32."""
    if training.precision == "auto":
        # GPUs before Ampere only emulate bfloat16, slower than float32.
        computes = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if computes else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[training.precision]


def compiles(runtime: RuntimeSettings, device: torch.device) -> bool:
    """Whether a run on this device compiles its model. `auto` is on for a CUDA device."""
    return device.type == "cuda" if runtime.compile == "auto" else runtime.compile


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """Context manager that runs the forward pass in `dtype`. Weights stay in float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queued work, for time measurements."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def memory_bytes() -> int:
    """Return the size of this machine's memory, in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def describe_device(device: torch.device) -> str:
    """Return the name of the GPU, or the processor's architecture and the number of torch's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple GPU"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
