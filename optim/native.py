"""The sign optimizers and DASGO on a CPU in a pass or two over memory: native.c, compiled at first use.

On a layer of GPT-2, two cores, AccAsro takes 1.5 times as long as fused AdamW in this way, 6 to 6.5 times as PyTorch
operations in cache-sized pieces, and 2.2 times as compiled by TorchInductor, which unpacks the byte of sign element by
element.
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
"""Elements in all from which compiling, once, for 0.3 s, is worth its time."""

# No contraction into fused multiply-adds: with it, an element's result would depend on where the vector loop ends.
_FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-shared", "-fPIC")
_CHOICES = (  # the first that compiles; Apple's compiler has no OpenMP, and one thread is fast enough for its memory
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
_DTYPES = {  # of a row; the last of `accasro` is a sign
    "asro": (torch.float32,) * 5,
    "accasro": (*(torch.float32,) * 6, torch.int8),
    "dasgo": (torch.float32,) * 3,
}

_wanted = True
_threads_started_by: int | None = None
"""The process that first ran a kernel."""


def use(wanted: bool) -> None:
    """Let the optimizers of this process use the kernels (the default), or not: then they run as PyTorch operations.

    The results differ by rounding. Processes that train replicas of one model should all use the same.
    """
    global _wanted
    _wanted = wanted


def is_available() -> bool:
    """Whether the optimizers can use the kernels here: they are wanted, and compile and load."""
    return _wanted and _loaded()[0] is not None


def description() -> str:
    """What the kernels are compiled with; or that, and why, PyTorch operations take their place."""
    if not _wanted:
        return "PyTorch operations (the kernels are switched off)"
    return _loaded()[1]


@functools.cache
def _loaded() -> tuple[ctypes.CDLL | None, str]:
    """The compiled kernels, if they compile and load, and their description.

    Compiling takes about 0.3 s, once a process. Nothing is kept on disk, so nothing can be stale or of another machine.
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
            break  # it would hang the next time too
        except subprocess.CalledProcessError:
            reason = f"{compiler[0]} fails"
        except OSError as error:  # where the folder is mounted `noexec`
            reason = f"what {compiler[0]} compiled does not load: {error}"
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
    """Whether a kernel can take a row: tensors of one shape that are in memory as they look, in its dtypes."""
    return all(
        tensor.dtype is dtype and tensor.shape == row[0].shape and is_bare(tensor)
        for tensor, dtype in zip(row, _DTYPES[kernel], strict=True)
    )


def is_bare(tensor: Tensor) -> bool:
    """Whether the numbers of a tensor lie one after the other in the memory of this process, and can be written.

    Not those of a subclass, of another device, of a lazy negation, of a storage that was freed or shrunk.
    """
    return bool(
        is_plain(tensor)
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and not tensor.is_neg()
        and not tensor.is_inference()  # has no version to increment
        and (tensor.storage_offset() + tensor.numel()) * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


def sees_memory() -> bool:
    """Whether new tensors have memory; not so in a mode that makes fake ones of all that it is given."""
    return is_bare(torch.empty(0, device="cpu"))


def update(kernel: str, rows: Sequence[Sequence[Tensor]], scalars: dict[str, Any]) -> None:
    """Run `asro` or `accasro` on rows (parameter, gradient, state...) that fit."""
    constants = (ctypes.c_float * len(_SCALARS))(*[scalars.get(name, 0.0) for name in _SCALARS])
    _call(kernel, _int64s([row[0].numel() for row in rows]), rows, _threads(), constants)
    increment_version([tensor for param, _, *state in rows for tensor in (param, *state)])


def dasgo_moments(grads: Sequence[Tensor], momenta: Sequence[Tensor], weight: float) -> list[tuple[Tensor, Tensor]]:
    """Move bare float32 momenta (m, n); the columns' sums of squares of gradient and momentum, float64 (n,)."""
    columns, threads = [grad.shape[1] for grad in grads], _threads()
    sums = torch.zeros(threads, 2, sum(columns), dtype=torch.float64, device="cpu")
    rows = list(zip(grads, momenta, strict=True))
    _call("dasgo_moments", _shapes(grads), rows, threads, ctypes.c_float(weight), ctypes.c_void_p(sums.data_ptr()))
    increment_version(momenta)
    of_grads, of_momenta = sums.sum(0)
    return list(zip(torch.split(of_grads, columns), torch.split(of_momenta, columns), strict=True))


def dasgo_step(weights: Sequence[Tensor], momenta: Sequence[Tensor], factors: Sequence[Tensor], keep: float) -> None:
    """`W ← keep · W + M diag(factors)` on bare float32 matrices (m, n) and vectors (n,)."""
    rows = list(zip(weights, momenta, factors, strict=True))
    _call("dasgo_step", _shapes(weights), rows, _threads(), ctypes.c_float(keep))
    increment_version(weights)


def _threads() -> int:
    """As many as PyTorch uses. One in a process forked after a kernel ran: OpenMP would wait for threads it lost."""
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
