"""Learning rate, momentum, beta2 and weight decay as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, assert_never

import torch

from pipelines.config import CurveSettings, ScheduleSettings, WsdDecay
from pipelines.errors import UsageError

_BETAS = ("momentum", "beta2")
"""Values that an optimizer may have as its `betas` instead, in their order."""


def factor_at(curve: CurveSettings, step: int, total_steps: int) -> float:
    """Return the factor of a scheduled value at a step (0-based) of a run of T = `total_steps`.

    In the warm-up of W steps it rises linearly from `initial` at step 0 to 1 at step W. At step t ≥ W it is

    - `constant`: 1.
    - `linear`, `cosine`: final + (1 − final) · r(p), with p = (t − W) / (T − W); r is defined below.
    - `wsd` (warm-up, stable, decay; arXiv 2404.06395): 1 until step B = T − `decay_fraction` · T, rounded, or until the
      end of a longer warm-up; then final + (1 − final) · r(p), with p = (t − B) / (T − B).
    - `inverse-sqrt` (Vaswani et al., arXiv 1706.03762, section 5.3): √(W / t); without warm-up, as for W = 1.

    `final` is the factor at step T: the last step, T − 1, has one more value. The decay r falls from r(0) = 1 to
    r(1) = 0: `linear` 1 − p, `cosine` (1 + cos πp) / 2, `sqrt` 1 − √p (arXiv 2405.18392, section 3), and `power`
    (1 − p)^`decay_power`, as in PyTorch's `PolynomialLR`.
    """
    warmup, (initial, final) = warmup_steps(curve, total_steps), curve.ends
    if step < warmup:
        return initial + (1 - initial) * step / warmup
    begin, shape = warmup, curve.decay
    match curve.kind:
        case "constant":
            return 1.0
        case "inverse-sqrt":
            return math.sqrt(max(1, warmup) / max(1, step))
        case "linear" | "cosine" as shape:
            pass
        case "wsd":
            begin = max(warmup, total_steps - round(curve.decay_fraction * total_steps))
        case _:
            assert_never(curve.kind)
    if step < begin:
        return 1.0
    progress = (step - begin) / max(1, total_steps - begin)
    return final + (1 - final) * _remaining(shape, progress, curve.decay_power)


def _remaining(shape: WsdDecay, progress: float, power: float) -> float:
    """Return r of `factor_at`, for a progress in [0, 1]."""
    match shape:
        case "linear":
            return 1 - progress
        case "cosine":
            return (1 + math.cos(math.pi * progress)) / 2
        case "sqrt":
            return 1 - math.sqrt(progress)
        case "power":
            return float((1 - progress) ** power)
        case _:
            assert_never(shape)


def warmup_steps(curve: CurveSettings, total_steps: int) -> int:
    """Return the number of warm-up steps, which may exceed `total_steps`."""
    return curve.warmup_steps or round(curve.warmup_fraction * total_steps)


@dataclass(frozen=True)
class ScheduledValue:
    """A value of a parameter group that follows a schedule."""

    name: str
    """`lr`, `momentum`, `beta2` or `weight_decay`."""
    part: str | None
    """Part of the model that the group is, if the model is split into parts."""
    key: str
    """The group's key."""
    index: int | None
    """Position in the pair under this key; None for a number."""
    base: float
    """The optimizer's value."""
    curve: CurveSettings
    total_steps: int

    def at(self, step: int) -> float:
        """Return the value at a step (0-based)."""
        return self.base * factor_at(self.curve, step, self.total_steps)


class Scheduler:
    """Sets the scheduled values of an optimizer's parameter groups; the optimizer is new, with its own values.

    Raises `UsageError` if no group has a value that is scheduled, or if a momentum or beta2 would leave [0, 1).
    """

    def __init__(self, schedule: ScheduleSettings, total_steps: int, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._values = [[*_values_of(group, schedule, total_steps)] for group in optimizer.param_groups]
        _refuse_without_effect(schedule, self.values)
        _refuse_out_of_range(self.values)

    @property
    def values(self) -> list[ScheduledValue]:
        """The scheduled values of all groups, in the order of the groups."""
        return [value for values in self._values for value in values]

    @property
    def keys(self) -> frozenset[str]:
        """Keys of the parameter groups that `apply` sets."""
        return frozenset(value.key for value in self.values)

    def apply(self, step: int) -> None:
        """Set the values of a step (0-based)."""
        # Trap: the groups themselves are not kept, because `load_state_dict` replaces them.
        for group, values in zip(self._optimizer.param_groups, self._values, strict=True):
            for value in values:
                if value.index is None:
                    group[value.key] = value.at(step)
                else:
                    pair = [*group[value.key]]
                    pair[value.index] = value.at(step)
                    group[value.key] = tuple(pair)


def _values_of(group: dict[str, Any], schedule: ScheduleSettings, total_steps: int) -> Iterator[ScheduledValue]:
    part = group.get("part")
    yield ScheduledValue("lr", part, "lr", None, group["lr"], schedule.of_part(part), total_steps)
    for name in (*_BETAS, "weight_decay"):
        curve: CurveSettings | None = getattr(schedule, name)
        if curve is None:
            continue
        if name in group:
            yield ScheduledValue(name, part, name, None, group[name], curve, total_steps)
        elif name in _BETAS and "betas" in group:
            index = _BETAS.index(name)
            yield ScheduledValue(name, part, "betas", index, group["betas"][index], curve, total_steps)


def _refuse_without_effect(schedule: ScheduleSettings, values: list[ScheduledValue]) -> None:
    found = {value.name for value in values}
    problems = [
        f"schedule.{name}: the optimizer has no {name}; leave it out"
        for name in (*_BETAS, "weight_decay")
        if getattr(schedule, name) is not None and name not in found
    ]
    problems += [
        f"schedule.parts.{part}: no parameter of the model is in this part; leave it out"
        for part in schedule.named_parts
        if part not in {value.part for value in values}
    ]
    if problems:
        raise UsageError("\n".join(problems))


def _refuse_out_of_range(values: list[ScheduledValue]) -> None:
    for value in values:
        # Warm-up and decay are monotonic, and between them the factor is 1.
        highest = max(value.base, value.at(0), value.at(value.total_steps))
        if value.name in _BETAS and highest >= 1:
            raise UsageError(f"schedule.{value.name}: goes up to {highest:g}; it must stay below 1")
