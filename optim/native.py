"""C kernels of Asro, AccAsro and DASGO for CPUs, with one or two passes over memory; native.c, compiled on first use.

Time of AccAsro on a layer of GPT-2, two cores, relative to fused AdamW: 1.5 with these kernels, 6 to 6.5 with PyTorch
operations in cache-sized chunks, 2.2 compiled by TorchInductor, which does not vectorize the int8 signs.

A `row` here is the tuple of tensors of one parameter (see rows.py).
"""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .base import is_plain

WORTH_FROM = 2**15
"""Total number of elements from which compilation, 0.3 s once, pays off."""

# No fused multiply-add: results would differ between the vectorized loop and its remainder.
_FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-shared", "-fPIC")
_CHOICES = (  # tried in order. Apple's compiler has no OpenMP; one thread saturates the memory there
    ("-fopenmp", "-march=native"),
    ("-fopenmp-simd", "-march=native"),
    ("-fopenmp-simd", "-mcpu=native"),
    ("-fopenmp-simd",),
)
_TIMEOUT_S = 60
_SCALARS = (
    "keep",
    "step_size",
    "eps",
    "weight1",
    "weight2",
    "beta2",
    "decrement",
    "min_scale",
    "max_scale",
    "increment",
)
_DTYPES = {  # of a row; the last tensor of `accasro` is `last_sign`
    "asro": (torch.float32,) * 5,
    "accasro": (*(torch.float32,) * 6, torch.int8),
    "dasgo": (torch.float32,) * 3,
}

_wanted = True
_threads_started_by: int | None = None
"""Process id of the first kernel call."""


def use(wanted: bool) -> None:
    """Enable (default) or disable the kernels in this process; without them, PyTorch operations run.

    The results differ by rounding, so all processes that train replicas of one model should use the same.
    """
    global _wanted
    _wanted = wanted


def is_available() -> bool:
    """Whether the kernels are enabled, compile and load."""
    return _wanted and _loaded()[0] is not None


def description() -> str:
    """Return the compiler command of the kernels, or why PyTorch operations run instead."""
    if not _wanted:
        return "PyTorch operations (the kernels are switched off)"
    return _loaded()[1]


@functools.cache
def _loaded() -> tuple[ctypes.CDLL | None, str]:
    """Compile and load the kernels; returns them, or None, and a description.

    Takes about 0.3 s, once per process. There is no cache on disk that could be stale or from another machine.
    """
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if not compiler or shutil.which(compiler[0]) is None:
        return None, f"PyTorch operations (no C compiler {' '.join(compiler)!r})"
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            return _first_that_loads(compiler, Path(folder))
    except OSError as error:
        return None, f"PyTorch operations (no temporary folder to compile in: {error.strerror or error})"


def _first_that_loads(compiler: list[str], folder: Path) -> tuple[ctypes.CDLL | None, str]:
    for choice in _CHOICES:
        command = [*compiler, *choice]
        try:
            return _compile(command, folder), f"C kernels ({' '.join(command)})"
        except subprocess.TimeoutExpired:
            reason = f"{compiler[0]} takes longer than {_TIMEOUT_S} s"
            break  # it would time out again
        except subprocess.CalledProcessError:
            reason = f"{compiler[0]} fails"
        except OSError as error:  # for example, the folder is mounted `noexec`
            reason = f"the library from {compiler[0]} does not load: {error}"
    return None, f"PyTorch operations ({reason})"


def _compile(compiler: list[str], folder: Path) -> ctypes.CDLL:
    source, target = folder / "native.c", folder / "native.so"
    source.write_text((resources.files(__package__) / "native.c").read_text(encoding="utf-8"), encoding="utf-8")
    command = [*compiler, *_FLAGS, str(source), "-o", str(target), "-lm"]
    subprocess.run(
        command,
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=_TIMEOUT_S,
    )
    return ctypes.CDLL(str(target))


def fits(kernel: str, row: Sequence[Tensor]) -> bool:
    """Whether a kernel supports a row: tensors of one shape, of the kernel's dtypes, with plain memory (`is_bare`)."""
    return all(
        tensor.dtype is dtype and tensor.shape == row[0].shape and is_bare(tensor)
        for tensor, dtype in zip(row, _DTYPES[kernel], strict=True)
    )


def is_bare(tensor: Tensor) -> bool:
    """Whether the elements are contiguous in CPU memory, and a kernel may read and write them by address.

    False for subclasses, other devices, lazy negations, and storages that were freed or shrunk.
    """
    return bool(
        is_plain(tensor)
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and not tensor.is_neg()
        and not tensor.is_inference()  # has no version counter to increment
        and (tensor.storage_offset() + tensor.numel()) * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


def sees_memory() -> bool:
    """Whether new tensors have memory: False in a `FakeTensorMode`."""
    return is_bare(torch.empty(0, device="cpu"))


def update(kernel: str, rows: Sequence[Sequence[Tensor]], scalars: dict[str, Any]) -> None:
    """Run the kernel `asro` or `accasro` on rows (parameter, gradient, state...) for which `fits` is true."""
    constants = (ctypes.c_float * len(_SCALARS))(*[scalars.get(name, 0.0) for name in _SCALARS])
    _call(kernel, _int64s([row[0].numel() for row in rows]), rows, _threads(), constants)
    increment_version([tensor for param, _, *state in rows for tensor in (param, *state)])


def dasgo_moments(grads: Sequence[Tensor], momenta: Sequence[Tensor], weight: float) -> list[tuple[Tensor, Tensor]]:
    """Update float32 momenta (m, n); returns column sums of squares of gradients and momenta, float64 (n,)."""
    columns, threads = [grad.shape[1] for grad in grads], _threads()
    sums = torch.zeros(threads, 2, sum(columns), dtype=torch.float64, device="cpu")
    rows = list(zip(grads, momenta, strict=True))
    _call("dasgo_moments", _shapes(grads), rows, threads, ctypes.c_float(weight), ctypes.c_void_p(sums.data_ptr()))
    increment_version(momenta)
    of_grads, of_momenta = sums.sum(0)
    return list(zip(torch.split(of_grads, columns), torch.split(of_momenta, columns), strict=True))


def dasgo_step(weights: Sequence[Tensor], momenta: Sequence[Tensor], factors: Sequence[Tensor], keep: float) -> None:
    """Compute `W ← keep · W + M diag(factors)` for float32 matrices (m, n) and vectors (n,)."""
    rows = list(zip(weights, momenta, factors, strict=True))
    _call("dasgo_step", _shapes(weights), rows, _threads(), ctypes.c_float(keep))
    increment_version(weights)


def _threads() -> int:
    """Return PyTorch's number of threads; 1 in a process forked after a kernel call, where OpenMP would deadlock."""
    global _threads_started_by
    _threads_started_by = _threads_started_by or os.getpid()
    return torch.get_num_threads() if _threads_started_by == os.getpid() else 1


def _call(
    kernel: str, sizes: ctypes.Array[ctypes.c_int64], rows: Sequence[Sequence[Tensor]], threads: int, *others: Any
) -> None:
    library, _ = _loaded()
    assert library is not None
    pointers = [tensor.data_ptr() for row in rows for tensor in row]
    tensors = (ctypes.c_void_p * len(pointers))(*pointers)
    library[kernel](ctypes.c_int64(len(rows)), sizes, tensors, ctypes.c_int64(threads), *others)


def _int64s(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def _shapes(matrices: Sequence[Tensor]) -> ctypes.Array[ctypes.c_int64]:
    return _int64s([size for matrix in matrices for size in matrix.shape])
