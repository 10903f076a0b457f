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
_SCALARS = ("keep", "step_size", "eps", "weight1", "weight2", "decrement", "min_scale", "max_scale", "increment")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; `None` where no C compiler is there (`CC`, else `cc`), or what it makes does not load.

    Compiling takes about 0.3 s, once a process. Nothing is kept on disk, so nothing can be stale or of another machine.
    """
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if not compiler or shutil.which(compiler[0]) is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        for choice in _CHOICES:
            try:
                return _compile([*compiler, *choice], Path(folder))
            except (OSError, subprocess.SubprocessError):
                continue
    return None


def _compile(compiler: list[str], folder: Path) -> ctypes.CDLL:
    source, target = folder / "native.c", folder / "native.so"
    source.write_text((resources.files(__package__) / "native.c").read_text(encoding="utf-8"), encoding="utf-8")
    command = [*compiler, *_FLAGS, str(source), "-o", str(target), "-lm"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return ctypes.CDLL(str(target))


def fits(row: Sequence[Tensor]) -> bool:
    """Whether a kernel can take a row: a float32 parameter, everything contiguous."""
    return row[0].dtype is torch.float32 and all(tensor.is_contiguous() for tensor in row)


def update(kernel: str, rows: Sequence[Sequence[Tensor]], scalars: dict[str, Any]) -> None:
    """Run `asro` or `accasro` on rows (parameter, gradient, state...) that fit: float32, but int8 for the sign."""
    constants = (ctypes.c_float * len(_SCALARS))(*[scalars.get(name, 0.0) for name in _SCALARS])
    _call(kernel, _int64s([row[0].numel() for row in rows]), rows, constants)


def dasgo_moments(grads: Sequence[Tensor], momenta: Sequence[Tensor], weight: float) -> list[tuple[Tensor, Tensor]]:
    """Move contiguous float32 momenta (m, n); the columns' sums of squares of gradient and momentum, float64 (n,)."""
    columns = [grad.shape[1] for grad in grads]
    sums = torch.zeros(torch.get_num_threads(), 2, sum(columns), dtype=torch.float64)
    rows = list(zip(grads, momenta, strict=True))
    _call("dasgo_moments", _shapes(grads), rows, ctypes.c_float(weight), ctypes.c_void_p(sums.data_ptr()))
    of_grads, of_momenta = sums.sum(0)
    return list(zip(torch.split(of_grads, columns), torch.split(of_momenta, columns), strict=True))


def dasgo_step(weights: Sequence[Tensor], momenta: Sequence[Tensor], factors: Sequence[Tensor], keep: float) -> None:
    """`W ← keep · W + M diag(factors)` on contiguous float32 matrices (m, n) and vectors (n,)."""
    rows = list(zip(weights, momenta, factors, strict=True))
    _call("dasgo_step", _shapes(weights), rows, ctypes.c_float(keep))


def _call(kernel: str, sizes: ctypes.Array[ctypes.c_int64], rows: Sequence[Sequence[Tensor]], *others: Any) -> None:
    """Call a kernel on as many threads as PyTorch uses."""
    loaded = library()
    assert loaded is not None
    pointers = [tensor.data_ptr() for row in rows for tensor in row]
    tensors = (ctypes.c_void_p * len(pointers))(*pointers)
    threads = ctypes.c_int64(torch.get_num_threads())
    loaded[kernel](ctypes.c_int64(len(rows)), sizes, tensors, threads, *others)


def _int64s(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def _shapes(matrices: Sequence[Tensor]) -> ctypes.Array[ctypes.c_int64]:
    return _int64s([size for matrix in matrices for size in matrix.shape])
