"""Resolve the settings of shadow optimizers. Imports neither torch nor the optimizers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pipelines.config import RunConfig, ShadowOptimizer, flatten, task_name
from pipelines.errors import UsageError
from pipelines.optimizers import parse_value, split_optimizer
from pipelines.resolve import Layer, preset_layer, preset_names

_NAMES = "shadows.optimizers"
_TABLES = f"{_NAMES}."
_OF_THE_OPTIMIZER = ("optimizer.", "schedule.")

Resolve = Callable[[Sequence[Layer]], RunConfig]


def resolve_with_shadows(layers: Sequence[Layer], resolve: Resolve) -> RunConfig:
    """Resolve layers in which `shadows.optimizers` is a list of names, such as `["muon", "adamw:lr=3e-4"]`.

    A shadow has the settings with which `--optimizer NAME` would train: those of the preset and of the tables
    `[optimizers.NAME]`, and its own keywords. Keys such as `optimizer.lr` of higher layers are for the run's own
    optimizer alone. Raises `UsageError` if the list is not valid, and like `resolve`.
    """
    place = max((index for index, layer in enumerate(layers) if _NAMES in layer.values), default=None)
    if place is None:
        return resolve(layers)
    source, names = layers[place].source, _names(layers[place])
    plain = [Layer(layer.source, _without(layer.values, _NAMES, _TABLES)) for layer in layers]
    # A resumed run keeps the settings of its shadows: the preset may be of another version now.
    before = resolve(layers[:1]).shadows.optimizers if any(map(_is_table, layers[0].values)) else {}
    shadows = {name: before.get(name) or _shadow(plain, name, source, resolve) for name in names}
    tables = {name: shadow.model_dump(mode="json", exclude_none=True) for name, shadow in shadows.items()}
    return resolve([*plain, Layer(source, flatten({"shadows": {"optimizers": tables}}))])


def shadow_configs(config: RunConfig) -> dict[str, RunConfig]:
    """Return the configuration of each shadow by name: that of the run with another optimizer and schedule."""
    training = config.training.model_copy(update={"ema_decay": None})
    return {
        name: config.model_copy(
            update={"optimizer": shadow.optimizer, "schedule": shadow.schedule, "training": training}
        )
        for name, shadow in config.shadows.optimizers.items()
    }


@contextlib.contextmanager
def errors_of_shadow() -> Iterator[None]:
    """Context manager in which errors about an optimizer name `shadows.optimizers` instead of `--optimizer`."""
    try:
        yield
    except UsageError as error:
        raise UsageError("\n".join(map(line_of_shadow, str(error).splitlines()))) from error


def line_of_shadow(line: str) -> str:
    """Return a line about an optimizer for the optimizer as a shadow."""
    rest = line.removeprefix("--optimizer ")
    return line if rest == line else f"{_NAMES}: {rest}"


def _is_table(key: str) -> bool:
    return key.startswith(_TABLES)


def _names(layer: Layer) -> list[str]:
    value = layer.values[_NAMES]
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UsageError(f'{layer.source}: {_NAMES} is {value!r}: write a list of names, such as ["muon", "adamw"]')
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"{layer.source}: {_NAMES}: {twice!r} is there twice; leave one out")
    return names


def _shadow(layers: Sequence[Layer], text: str, source: str, resolve: Resolve) -> ShadowOptimizer:
    place = f"{source}: {_NAMES}: {text}"
    try:
        name, keywords = split_optimizer(text)
    except ValueError as error:
        raise UsageError(f"{place}: {error}") from None
    if "name" in keywords:
        raise UsageError(f"{place}: name: not a setting; the name of the optimizer comes before the colon")
    lowest, *others = layers
    own = {f"optimizer.{key}": parse_value(value) for key, value in keywords.items()}
    with errors_of_shadow():
        config = resolve(
            [
                Layer(lowest.source, {**_without(lowest.values, *_OF_THE_OPTIMIZER), **_of_preset(lowest, name)}),
                *(Layer(layer.source, _without(layer.values, "optimizer.")) for layer in others),
                Layer(place, {"optimizer.name": name, **own}),
            ]
        )
    return ShadowOptimizer(optimizer=config.optimizer, schedule=config.schedule)


def _of_preset(lowest: Layer, name: str) -> dict[str, Any]:
    """Return what the preset of the lowest layer has for an optimizer; that layer may be a stored run."""
    task, preset = task_name(lowest.values.get("task")), lowest.values.get("preset")
    if preset not in preset_names(task):
        return {key: value for key, value in lowest.values.items() if key.startswith("schedule.")}
    values = preset_layer(task, preset).for_optimizer(name)
    return {key: value for key, value in values.items() if key.startswith(_OF_THE_OPTIMIZER)}


def _without(values: Mapping[str, Any], *prefixes: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if not key.startswith(prefixes)}
