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

import torch
from torch import Tensor

from . import native
from .base import BaseOptimizer, Group, Scalar, State, gradient, is_plain, new_step, on_host
from .rows import Row, Update, as_vectors, in_pieces, update_rows

COMPILE_FROM = 2**22
"""Elements in all from which compiling for a GPU, which takes tens of seconds, is worth its time."""

_Graph = Callable[[Sequence[Row], dict[str, Tensor]], None]
_graphs: dict[Update, _Graph | None] = {}


class ElementwiseOptimizer(BaseOptimizer):
    """Template: a subclass names its update, as a function and as a kernel, and implements the two methods."""

    update: Update
    kernel: str
    """The same in native.c."""
    state_keys: tuple[str, ...]
    """The state besides the count of steps, in the order in which `update` takes it."""

    native_kernels = True

    def new_state(self, param: Tensor) -> State:
        """The state of a parameter before its first step, besides the count of steps."""
        raise AssertionError("a subclass implements this")

    def scalars(self, group: Group, step: Scalar) -> dict[str, Scalar]:
        """The numbers that `update` takes at a step (1-based), as tensors where the step is one."""
        raise AssertionError("a subclass implements this")

    def update_group(self, group: Group, params: list[Tensor]) -> None:
        """Update all parameters of equal device, precision and step together."""
        self.prepare_states(group, params)
        torch._foreach_add_([self.state[param]["step"] for param in params], 1.0)
        for step, bucket in self._alike(params):
            self._run([self._row(param, group) for param in bucket], self.scalars(group, step))

    def initial_state(self, group: Group, param: Tensor) -> State:
        """The count of steps, and the optimizer's own state."""
        return {"step": new_step(self.step_device(group, param)), **self.new_state(param)}

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
        if device == "cuda" and elements >= COMPILE_FROM and run_compiled(update, rows, scalars):
            return
        if device == "cpu" and elements >= native.WORTH_FROM:
            rows = [as_vectors(row) if all(map(is_plain, row)) else row for row in rows]
            if native.is_available() and native.sees_memory():
                rows = self._run_native(rows, scalars)
            rows = [piece for row in rows for piece in in_pieces(row)]
        update_rows(update, rows, scalars)

    def _run_native(self, rows: list[Row], scalars: dict[str, Scalar]) -> list[Row]:
        """Update the rows that a kernel can take; the others are returned."""
        fitting = [row for row in rows if native.fits(self.kernel, row)]
        if fitting:
            native.update(self.kernel, fitting, scalars)
        return [row for row in rows if not native.fits(self.kernel, row)]


def run_compiled(update: Update, rows: Sequence[Row], scalars: dict[str, Scalar]) -> bool:
    """Update all rows as one compiled graph; `False`, the first time with a warning, where the compiler fails."""
    from torch._dynamo.exc import TorchDynamoException  # loading it takes seconds

    if update not in _graphs:
        _graphs[update] = _compile(update)
    graph = _graphs[update]
    if graph is None:
        return False
    # As tensors, so that a new learning rate or step is no new constant, which would be compiled anew.
    tensors = {name: torch.as_tensor(value, dtype=rows[0][1].dtype) for name, value in scalars.items()}
    try:
        graph(rows, tensors)
    except (TorchDynamoException, OSError) as error:  # the second where there is no folder for the compiler's cache
        _graphs[update] = None
        reason = " ".join(str(error).split())[:200]  # its first line alone may say nothing but "inductor raised:"
        warnings.warn(f"the optimizer's update is not compiled, and slower: {reason}", stacklevel=2)
        return False
    return True


def _compile(update: Update) -> _Graph:
    return torch.compile(functools.partial(update_rows, update), fullgraph=True, dynamic=False)
