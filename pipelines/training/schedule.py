"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import assert_never

from pipelines.config import ScheduleSettings


def lr_factor(schedule: ScheduleSettings, step: int, total_steps: int) -> float:
    """Return the factor of the optimizer's `lr` at a step (0-based).

    In the warm-up it rises linearly from `initial_lr_fraction` at the first step to 1. Then it is constant, or falls
    along a cosine or a line to `final_lr_fraction` at `total_steps`.
    """
    warmup = warmup_steps(schedule, total_steps)
    if step < warmup:
        return schedule.initial_lr_fraction + (1 - schedule.initial_lr_fraction) * step / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    match schedule.kind:
        case "constant":
            return 1.0
        case "cosine":
            remaining = (1 + math.cos(math.pi * progress)) / 2
        case "linear":
            remaining = 1 - progress
        case _:
            assert_never(schedule.kind)
    return schedule.final_lr_fraction + (1 - schedule.final_lr_fraction) * remaining


def warmup_steps(schedule: ScheduleSettings, total_steps: int) -> int:
    """Return the number of warm-up steps, which may exceed `total_steps`."""
    return schedule.warmup_steps or round(schedule.warmup_fraction * total_steps)
