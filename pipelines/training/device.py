"""Which device a run uses, in which precision, and what a machine is called in a run's records."""

from __future__ import annotations

import contextlib
import os
import platform

import torch

from pipelines.config import RuntimeSettings, TrainingSettings
from pipelines.errors import UsageError
from pipelines.training.launched import launched, local_rank


def pick_device(runtime: RuntimeSettings) -> torch.device:
    """The device asked for, or the best at hand, of several GPUs this process's own; `UsageError` if there is none."""
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
    """The dtype of the forward pass: `auto` is bfloat16 on a GPU that computes in it, else float32."""
    if training.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[training.precision]


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """Run the forward pass in `dtype`; weights stay in float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all its work, so that a clock can be read."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def memory_bytes() -> int:
    """The memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def describe_device(device: torch.device) -> str:
    """The device by the name on its box, or the processor and how many threads compute."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple GPU"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
