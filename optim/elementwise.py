"""Base class of the elementwise optimizers, and the fast implementations of their updates.

An update is written as a function on tensors, and again in native.c. It runs

- on a CPU as a C kernel, for many float32 parameters, if there is a C compiler;
- on a GPU compiled by `torch.compile`, all parameters in one graph, if there are many;
- else as PyTorch operations, on a CPU in chunks that fit in its cache, on a GPU with parameters joined to long vectors.

A `Row` is the tuple of tensors of one parameter (see rows.py).
"""

from __future__ import annotations

import functools
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from . import native
from .base import BaseOptimizer, Group, Scalar, State, gradient, is_plain, new_step, on_host
from .rows import Row, Update, as_vectors, in_chunks, joined, update_rows

COMPILE_FROM = 2**22
"""Total number of elements from which compilation for a GPU, which takes tens of seconds, pays off."""

_Graph = Callable[[Sequence[Row], dict[str, Tensor]], None]
_graphs: dict[Update, _Graph | None] = {}


class ElementwiseOptimizer(BaseOptimizer):
    """Base class: a subclass sets the attributes below, and implements `new_state` and `scalars`."""

    update: Update
    kernel: str
    """Name of the same update in native.c."""
    state_keys: tuple[str, ...]
    """State keys except `step`, in the order of `update`'s arguments."""

    native_kernels = True

    def new_state(self, param: Tensor) -> State:
        """Return the state of a parameter before its first step, without the step count."""
        raise AssertionError("a subclass implements this")

    def scalars(self, group: Group, step: Scalar) -> dict[str, Scalar]:
        """Return the scalar arguments of `update` at a step (1-based): tensors if the step is a tensor."""
        raise AssertionError("a subclass implements this")

    def update_group(self, group: Group, params: list[Tensor]) -> None:
        """Update all parameters of equal device, dtype and step together."""
        self.prepare_states(group, params)
        torch._foreach_add_([self.state[param]["step"] for param in params], 1.0)
        for step, bucket in self._alike(params):
            self._run([self._row(param, group) for param in bucket], self.scalars(group, step))

    def initial_state(self, group: Group, param: Tensor) -> State:
        """Return the step count and the state of `new_state`."""
        return {"step": new_step(self.step_device(group, param)), **self.new_state(param)}

    def _alike(self, params: list[Tensor]) -> Iterator[tuple[Scalar, list[Tensor]]]:
        """Yield parameters to update together, with their step. Comparing steps on a GPU would synchronize."""
        buckets: dict[object, list[Tensor]] = defaultdict(list)
        for param in params:
            step = on_host(self.state[param]["step"])
            buckets[param.device, param.dtype, id(param) if isinstance(step, Tensor) else step].append(param)
        for bucket in buckets.values():
            yield on_host(self.state[bucket[0]]["step"]), bucket

    def _row(self, param: Tensor, group: Group) -> Row:
        # By key: a loaded state may have its keys in another order.
        state = [self.state[param][key] for key in self.state_keys]
        return (param, gradient(param, group["maximize"]), *state)

    def _run(self, rows: list[Row], scalars: dict[str, Scalar]) -> None:
        elements = sum(row[0].numel() for row in rows)
        update, device = type(self).update, rows[0][0].device.type
        if device == "cuda":
            if elements < COMPILE_FROM or not run_compiled(update, rows, scalars):
                for group in joined(rows):
                    with group as row:
                        update_rows(update, [row], scalars)
            return
        if device == "cpu" and elements >= native.WORTH_FROM:
            rows = [as_vectors(row) if all(map(is_plain, row)) else row for row in rows]
            if native.is_available() and native.sees_memory():
                rows = self._run_native(rows, scalars)
            rows = [chunk for row in rows for chunk in in_chunks(row)]
        update_rows(update, rows, scalars)

    def _run_native(self, rows: list[Row], scalars: dict[str, Scalar]) -> list[Row]:
        """Update the rows that the kernel supports; returns the others."""
        fitting = [row for row in rows if native.fits(self.kernel, row)]
        if fitting:
            native.update(self.kernel, fitting, scalars)
        return [row for row in rows if not native.fits(self.kernel, row)]


def run_compiled(update: Update, rows: Sequence[Row], scalars: dict[str, Scalar]) -> bool:
    """Update all rows as one compiled graph. Returns False if compilation fails, with a warning the first time."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException  # loading them takes seconds

    if update not in _graphs:
        _graphs[update] = _compile(update)
    graph = _graphs[update]
    if graph is None:
        return False
    # As tensors: the graph would be recompiled for every new constant, such as a new learning rate or step.
    tensors = {name: torch.as_tensor(value, dtype=rows[0][1].dtype) for name, value in scalars.items()}
    try:
        graph(rows, tensors)
    # More than eight groups of different shapes hit a limit. OSError: no writable folder for the compiler's cache.
    except (TorchDynamoException, FailOnRecompileLimitHit, OSError) as error:
        _graphs[update] = None
        reason = " ".join(str(error).split())[:200]  # the first line may be only "inductor raised:"
        warnings.warn(f"the optimizer's update is not compiled, so it is slower: {reason}", stacklevel=2)
        return False
    return True


def _compile(update: Update) -> _Graph:
    return torch.compile(functools.partial(update_rows, update), fullgraph=True, dynamic=False)
