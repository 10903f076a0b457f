"""Shorten a run, with its schedule in proportion."""

from __future__ import annotations

from typing import Any

from pipelines.config import RunConfig, load_run_config


def shortened(config: RunConfig, steps: int) -> RunConfig:
    """Return the configuration with fewer steps.

    Warm-ups in steps and the interval of validations shrink in proportion; decays are fractions of all steps anyway.
    A run that is not longer stays as it is.
    """
    whole = config.training.steps
    if steps >= whole:
        return config
    values = config.model_dump(mode="json")
    values["training"]["steps"] = steps
    _shrink(values["schedule"], "warmup_steps", steps / whole)
    _shrink(values["evaluation"], "every", steps / whole)
    return load_run_config(values)


def _shrink(table: dict[str, Any], key: str, fraction: float) -> None:
    """Multiply a number of steps, also in tables within the table; 0 and None stay."""
    for name, value in table.items():
        if isinstance(value, dict):
            _shrink(value, key, fraction)
        elif name == key and value:
            table[name] = max(1, round(value * fraction))
