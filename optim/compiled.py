"""Updates compiled by `torch.compile` into one graph for all parameters, for GPUs."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .base import Scalar
from .rows import Row, Update, update_rows

WORTH_FROM = 2**22
"""Elements in all from which compiling, which takes tens of seconds, is worth its time."""

_Graph = Callable[[Sequence[Row], dict[str, Tensor]], None]
_graphs: dict[Update, _Graph | None] = {}


def run(update: Update, rows: Sequence[Row], scalars: dict[str, Scalar]) -> bool:
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
