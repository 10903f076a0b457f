"""The template of the optimizers that treat every element on its own, and the ways to run their updates fast.

An update is written once as a function on tensors, and once more in native.c. It runs

- on a CPU as a native kernel, where the parameters are many, in float32, and a C compiler is there;
- on a GPU compiled by `torch.compile`, all parameters in one graph, where they are many;
- else operation by operation, on a CPU in pieces that stay in its cache.
"""

from __future__ import annotations

import functools
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from optim import native
from optim.base import BaseOptimizer, Group, Scalar, State, gradient, new_step, on_host

NATIVE_FROM = 2**15
"""Elements in all from which compiling native.c, once, for 0.3 s, is worth its time."""

COMPILE_FROM = 2**22
"""Elements in all from which `torch.compile` on a GPU is worth its tens of seconds."""

PIECE = 2**18
"""Elements that a CPU updates at a time, 8 MiB in all: pieces of half or twice this were slower (32 MiB of L3)."""

Row = Sequence[Tensor]
"""A parameter, its gradient in the precision of the state, and its state without the count of steps."""

Update = Callable[..., None]
"""Moves one row by a step, in place: `update(weight, grad, *state, **scalars)`, all tensors of equal shape."""


class ElementwiseOptimizer(BaseOptimizer):
    """Template: a subclass names its update, as a function and as a kernel, and implements the two methods."""

    update: Update
    kernel: str
    """The same in native.c."""
    state_keys: tuple[str, ...]
    """The state besides the count of steps, in the order in which `update` takes it."""

    def new_state(self, param: Tensor) -> State:
        """The state of a parameter before its first step, besides the count of steps."""
        raise AssertionError("a subclass implements this")

    def scalars(self, group: Group, step: Scalar) -> dict[str, Scalar]:
        """The numbers that `update` takes at a step (1-based), as tensors where the step is one."""
        raise AssertionError("a subclass implements this")

    def update_group(self, group: Group, params: list[Tensor]) -> None:
        """Update all parameters of equal device, precision and step together."""
        for param in params:
            if not self.state[param]:
                self.state[param].update(step=new_step(self.step_device(group, param)), **self.new_state(param))
        torch._foreach_add_([self.state[param]["step"] for param in params], 1.0)
        for step, bucket in self._alike(params):
            self._run([self._row(param, group) for param in bucket], self.scalars(group, step))

    def _alike(self, params: list[Tensor]) -> Iterator[tuple[Scalar, list[Tensor]]]:
        """Parameters that can be updated together, with their step; steps on a device cannot be compared."""
        buckets: dict[object, list[Tensor]] = defaultdict(list)
        for param in params:
            step = on_host(self.state[param]["step"])
            buckets[param.device, param.dtype, id(param) if isinstance(step, Tensor) else step].append(param)
        for bucket in buckets.values():
            yield on_host(self.state[bucket[0]]["step"]), bucket

    def _row(self, param: Tensor, group: Group) -> Row:
        # By name: a loaded state may hold its tensors in another order.
        state = [self.state[param][key] for key in self.state_keys]
        return (param, gradient(param, group["maximize"]), *state)

    def _run(self, rows: list[Row], scalars: dict[str, Scalar]) -> None:
        elements = sum(row[0].numel() for row in rows)
        update, device = type(self).update, rows[0][0].device.type
        if device == "cuda" and elements >= COMPILE_FROM and _run_compiled(update, rows, scalars):
            return
        if device == "cpu":
            rows = [as_vectors(row) for row in rows]
            if elements >= NATIVE_FROM and native.library() is not None:
                native.update(self.kernel, [row for row in rows if _is_native(row)], scalars)
                rows = [row for row in rows if not _is_native(row)]
            rows = [piece for row in rows for piece in _in_pieces(row)]
        update_rows(update, rows, scalars)


def update_rows(update: Update, rows: Sequence[Row], scalars: dict[str, Scalar]) -> None:
    """Update each row; a weight of lower precision than its state is rounded once."""
    for param, grad, *state in rows:
        weight = param.to(grad.dtype)
        update(weight, grad, *state, **scalars)
        if weight is not param:
            param.copy_(weight)


def add_scaled_(target: Tensor, values: Tensor, factor: Scalar) -> Tensor:
    """`target + factor · values`, in place, in one operation where the factor is a number."""
    if isinstance(factor, Tensor):
        return target.add_(values * factor)
    return target.add_(values, alpha=factor)


def as_vectors(row: Row) -> Row:
    """The same memory as vectors, where weight and state are dense and laid out alike; else the row itself."""
    if all(tensor.is_contiguous() for tensor in row):
        return [tensor.view(-1) for tensor in row]
    param, grad, *state = [tensor.permute(_by_stride(row[0])) for tensor in row]
    if not all(tensor.is_contiguous() for tensor in (param, *state)):
        return row
    return [tensor.view(-1) for tensor in (param, grad.contiguous(), *state)]


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a stretch of memory, each once, in whatever order."""
    return tensor.is_contiguous() or tensor.permute(_by_stride(tensor)).is_contiguous()


def _by_stride(tensor: Tensor) -> list[int]:
    """The dimensions as they lie in memory, the outermost first."""
    return sorted(range(tensor.ndim), key=tensor.stride, reverse=True)


def _is_native(row: Row) -> bool:
    return row[0].ndim == 1 and row[0].dtype is torch.float32 and all(tensor.is_contiguous() for tensor in row)


def _in_pieces(row: Row) -> Iterator[Row]:
    if row[0].ndim == 1:
        return zip(*[torch.split(tensor, PIECE) for tensor in row], strict=True)
    return iter([row])


def _run_compiled(update: Update, rows: Sequence[Row], scalars: dict[str, Scalar]) -> bool:
    """Run all rows as one compiled graph; `False`, once with a warning, where the compiler fails."""
    from torch._dynamo.exc import TorchDynamoException  # loading it takes seconds

    compiled = _compiled(update)
    if compiled is None:
        return False
    # As tensors, so that a new learning rate or step is no new constant, which would be compiled anew.
    tensors = {name: torch.as_tensor(value, dtype=rows[0][1].dtype) for name, value in scalars.items()}
    try:
        compiled(rows, tensors)
    except TorchDynamoException as error:
        _BROKEN.add(update)
        warnings.warn(f"the optimizer's update is not compiled, and slower: {str(error).splitlines()[0]}", stacklevel=2)
        return False
    return True


_BROKEN: set[Update] = set()


@functools.cache
def _graph(update: Update) -> Callable[[Sequence[Row], dict[str, Tensor]], None]:
    return torch.compile(functools.partial(update_rows, update), fullgraph=True, dynamic=False)


def _compiled(update: Update) -> Any:
    return None if update in _BROKEN else _graph(update)
