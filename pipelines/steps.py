"""Resolve the configuration of a run whose length may be given in tokens, epochs or tokens per parameter."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pipelines.config import RunConfig
from pipelines.errors import UsageError
from pipelines.gpt2.initial_model import resolve_with_initial_model
from pipelines.resolve import Layer
from pipelines.tasks import task_of

_STEPS = "training.steps"
LENGTHS = (_STEPS, "training.tokens", "training.tokens_per_parameter", "training.epochs")
"""Settings of the length of a run. Each replaces the others of lower layers."""
_MOST_STEPS = 10**12


def resolve_run(layers: Sequence[Layer]) -> RunConfig:
    """Merge layers like `resolve_with_initial_model`, and convert the length of the run to `training.steps`.

    The steps are rounded up. Epochs and tokens per parameter need the data, of which only the manifest is read.
    Raises `UsageError` if a layer gives two lengths, and `AsgoError` if the data cannot be read.
    """
    length = _highest_length(layers)
    if length is None:
        return resolve_with_initial_model(layers)
    source, key = length
    others = set(LENGTHS) - {key}
    layers = [Layer(each.source, {k: v for k, v in each.values.items() if k not in others}) for each in layers]
    if key == _STEPS:
        return resolve_with_initial_model(layers)
    base, *given = layers  # the lowest layer gets steps, which every configuration needs, until the number is known
    config = resolve_with_initial_model([Layer(base.source, {**base.values, _STEPS: 1}), *given])
    training, task = config.training, task_of(config)
    steps = math.ceil(task.length(config) / (training.batch_size * task.units_per_sample(config)))
    if steps > _MOST_STEPS:
        raise UsageError(f"{source}: {key}: makes {steps:,} steps; the maximum is {_MOST_STEPS:,}")
    known = training.model_copy(update={"steps": steps, key.removeprefix("training."): None})
    return config.model_copy(update={"training": known})


def _highest_length(layers: Sequence[Layer]) -> tuple[str, str] | None:
    """Return source and key of the highest layer that gives a length. Raises `UsageError` if a layer gives two."""
    found = [(layer.source, [key for key in LENGTHS if key in layer.values]) for layer in layers]
    problems = [f"{source}: give one of {' and '.join(keys)}" for source, keys in found if len(keys) > 1]
    if problems:
        raise UsageError("\n".join(problems))
    return next(((source, keys[0]) for source, keys in reversed(found) if keys), None)
