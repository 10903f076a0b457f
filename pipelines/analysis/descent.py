"""Optimizers side by side on the same problem, each on a copy of its own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipelines.analysis.optimizer_settings import OptimizerSettings, build

_STEPS_A_REPORT = 50


def descend(
    loss: Callable[[Sequence[Tensor]], Tensor],
    stacks: Sequence[Tensor],
    settings: Sequence[OptimizerSettings],
    steps: int,
    noise: Tensor | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Tensor]:
    """Move the copies of a problem's parameters, in place; yield the losses, `(k,)`, at the start and after each step.

    Each of the stacks holds one parameter k times, `(k, ...)`, a copy a setting, and `loss` gives the k losses. A row
    of `noise`, `(steps, ...)`, is added to all gradients of a step. A copy whose loss is not finite moves no more.
    `progress` is called with the number of steps just taken.
    """
    # Autograd takes about as long for one copy as for a few.
    leaves = [stack.detach().requires_grad_() for stack in stacks]
    copies = list(zip(*(stack.unbind() for stack in stacks), strict=True))
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
                # Fused optimizers on a CPU read the gradient as if it were laid out like the parameter.
                param.grad = gradient.contiguous() if is_finite else None
        for optimizer in optimizers:
            optimizer.step()
        if progress is not None and (step + 1) % _STEPS_A_REPORT == 0:
            progress(_STEPS_A_REPORT)


def first_for_good(reached: npt.NDArray[np.bool_]) -> int | None:
    """The first index from which all are true; `None` if the last is not."""
    missed = np.flatnonzero(~reached)
    first = int(missed[-1]) + 1 if missed.size else 0
    return first if first < len(reached) else None


def _optimizers(
    settings: Sequence[OptimizerSettings], copies: Sequence[Sequence[Tensor]], steps: int
) -> Iterator[torch.optim.Optimizer]:
    """One for all neighbours that differ in their rate alone: most of a step's time is spent once an optimizer."""

    def all_but_rate(pair: tuple[OptimizerSettings, Sequence[Tensor]]) -> dict[str, Any]:
        return {**pair[0].keywords, "lr": None, "name": pair[0].optimizer}

    for _, neighbours in itertools.groupby(zip(settings, copies, strict=True), all_but_rate):
        alike = list(neighbours)
        groups = [{"params": list(copy), "lr": setting.keywords["lr"]} for setting, copy in alike]
        yield build(alike[0][0], groups, steps)
