"""Run several optimizers on the same problem, each on its own copy of the parameters."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipelines.analysis.optimizer_settings import OptimizerSettings, build
from pipelines.imported_optimizers import errors_named
from pipelines.optimizers import import_path_of

_STEPS_PER_REPORT = 50


def descend(
    loss: Callable[[Sequence[Tensor]], Tensor],
    stacks: Sequence[Tensor],
    settings: Sequence[OptimizerSettings],
    steps: int,
    noise: Tensor | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Tensor]:
    """Update k copies of a problem's parameters in place; yield the losses, `(k,)`, at the start and after each step.

    Each of `stacks`, `(k, ...)`, holds one parameter k times, one copy per setting, and `loss` returns the k losses. A
    row of `noise`, `(steps, ...)`, is added to all gradients of a step. A copy stops once its loss is not finite.
    `progress` is called with the number of steps since its last call. Raises `UsageError` if a step of an imported
    optimizer fails.
    """
    # One backward pass for all copies: autograd takes about as long for one copy as for a few.
    leaves = [stack.detach().requires_grad_() for stack in stacks]
    views = list(zip(*(stack.unbind() for stack in stacks), strict=True))
    # Other libraries may replace the data of a parameter: they get tensors of their own.
    copies = [
        view if import_path_of(setting.optimizer) is None else tuple(nn.Parameter(each.clone()) for each in view)
        for view, setting in zip(views, settings, strict=True)
    ]
    optimizers = list(_optimizers(settings, copies, steps))
    for step in itertools.count():
        losses = loss(leaves)
        yield losses.detach()
        if step == steps:
            return
        gradients = torch.autograd.grad(losses.sum(), leaves)
        if noise is not None:
            gradients = tuple(gradient + noise[step] for gradient in gradients)
        finite = losses.isfinite().tolist()
        for copy, is_finite, *of_copy in zip(copies, finite, *gradients, strict=True):
            for param, gradient in zip(copy, of_copy, strict=True):
                # Fused CPU optimizers assume that the gradient has the parameter's memory layout.
                param.grad = gradient.contiguous() if is_finite else None
        for name, optimizer in optimizers:
            imported = import_path_of(name) is not None
            with errors_named(name, "a step with it fails") if imported else contextlib.nullcontext():
                optimizer.step()
        for view, copy in zip(views, copies, strict=True):
            if view is not copy:
                torch._foreach_copy_(list(view), [param.detach() for param in copy])
        if progress is not None and (step + 1) % _STEPS_PER_REPORT == 0:
            progress(_STEPS_PER_REPORT)


def first_for_good(reached: npt.NDArray[np.bool_]) -> int | None:
    """Return the first index from which all values are true; `None` if the last one is false."""
    missed = np.flatnonzero(~reached)
    first = int(missed[-1]) + 1 if missed.size else 0
    return first if first < len(reached) else None


def _optimizers(
    settings: Sequence[OptimizerSettings], copies: Sequence[Sequence[Tensor]], steps: int
) -> Iterator[tuple[str, torch.optim.Optimizer]]:
    """Yield name and optimizer, one for settings that differ only in the rate: most of a step's cost is per optimizer.

    Those of other libraries are separate: groups of one optimizer may depend on each other.
    """

    def all_but_rate(pair: tuple[OptimizerSettings, Sequence[Tensor]]) -> dict[str, Any]:
        if import_path_of(pair[0].optimizer) is not None:
            return {"separate": id(pair[1])}
        return {**pair[0].keywords, "lr": None, "name": pair[0].optimizer}

    for _, neighbours in itertools.groupby(zip(settings, copies, strict=True), all_but_rate):
        alike = list(neighbours)
        groups = [{"params": list(copy), "lr": setting.keywords["lr"]} for setting, copy in alike]
        optimizer = build(alike[0][0], groups, steps)
        if callable(start := getattr(optimizer, "train", None)):  # schedule-free optimizers must be told
            start()
        yield alike[0][0].optimizer, optimizer
