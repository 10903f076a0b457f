"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import assert_never

from pipelines.config import ScheduleSettings


def lr_factor(schedule: ScheduleSettings, step: int, total_steps: int) -> float:
    """What the optimizer's `lr` is multiplied by at a step (0-based).

    Warm-up rises linearly from `initial_lr_fraction` at the first step to 1; then the factor stays, or falls along a
    cosine or a line to `final_lr_fraction` at `total_steps`.
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
    """How many steps of a run are warm-up; it may be more than there are."""
    return schedule.warmup_steps or round(schedule.warmup_fraction * total_steps)
