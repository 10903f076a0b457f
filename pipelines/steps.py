"""Resolve the configuration of a run: alternatives replace each other, and its length becomes a number of steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pipelines.config import RunConfig
from pipelines.errors import UsageError
from pipelines.hf.initial_model import resolve_with_initial_model
from pipelines.resolve import Layer
from pipelines.shadow_settings import resolve_with_shadows
from pipelines.tasks import task_of

_STEPS = "training.steps"
LENGTHS = (_STEPS, "training.tokens", "training.tokens_per_parameter", "training.epochs")
"""Settings of the length of a run."""
_ALTERNATIVES = (LENGTHS, ("evaluation.batches", "evaluation.tokens"))
"""Settings of which a run has one: each replaces the others of lower layers."""
_MOST_STEPS = 10**12


def resolve_run(layers: Sequence[Layer]) -> RunConfig:
    """Merge layers like `resolve_with_initial_model`, with shadow optimizers, and with the length of the run in steps.

    The steps are rounded up. Epochs and tokens per parameter need the data, of which only the manifest is read.
    Raises `UsageError` if a layer gives two alternatives or a wrong shadow, and `AsgoError` if the data cannot be read.
    """
    return resolve_with_shadows(_without_replaced(layers), _resolve_length)


def _resolve_length(layers: Sequence[Layer]) -> RunConfig:
    given = ((each.source, key) for each in reversed(layers) for key in LENGTHS if key in each.values)
    source, key = next(given, ("", _STEPS))
    if key == _STEPS:
        return resolve_with_initial_model(layers)
    base, *others = layers  # the lowest layer gets steps, which every configuration needs, until the number is known
    config = resolve_with_initial_model([Layer(base.source, {**base.values, _STEPS: 1}), *others])
    training, task = config.training, task_of(config)
    steps = math.ceil(task.length(config) / (training.batch_size * task.units_per_sample(config)))
    if steps > _MOST_STEPS:
        raise UsageError(f"{source}: {key}: makes {steps:,} steps; the maximum is {_MOST_STEPS:,}")
    known = training.model_copy(update={"steps": steps, key.removeprefix("training."): None})
    return config.model_copy(update={"training": known})


def alternatives_of(key: str) -> tuple[str, ...]:
    """Return the settings that `key` replaces, itself included."""
    return next((group for group in _ALTERNATIVES if key in group), (key,))


def _without_replaced(layers: Sequence[Layer]) -> list[Layer]:
    """Return the layers without the settings that a higher one replaces. Raises `UsageError` if a layer gives two."""
    problems: list[str] = []
    replaced: set[str] = set()
    for group in _ALTERNATIVES:
        given = [(layer.source, [key for key in group if key in layer.values]) for layer in layers]
        problems += [f"{source}: give one of {' and '.join(keys)}" for source, keys in given if len(keys) > 1]
        kept = next((keys[0] for _, keys in reversed(given) if keys), None)
        replaced |= set(group) - {kept} if kept else set()
    if problems:
        raise UsageError("\n".join(problems))
    return [Layer(each.source, {k: v for k, v in each.values.items() if k not in replaced}) for each in layers]
