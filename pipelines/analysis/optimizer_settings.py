"""The optimizers that `asgo viz` compares, with their keywords."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from models.matrix_problems import PROBLEMS
from optim import optimizer_class
from optim.specs import REQUIRED, spec_of, unknown_name
from pipelines.errors import UsageError
from pipelines.imported_optimizers import check_keywords, default_lr, named_constructor, one_line
from pipelines.optimizers import import_path_of, parse_value, split_optimizer
from pipelines.resolve import read_preset

POINTS, MATRICES = "asro-functions", "matrix-problems"  # presets for 2-D functions and for matrix problems

# Keywords that choose an implementation are not offered; --steps sets the length for all optimizers.
_NOT_OFFERED = {"params", "total_steps", "foreach", "fused", "capturable", "differentiable", "maximize"}


@dataclass(frozen=True)
class OptimizerSettings:
    """An optimizer (a name or an import path), the keywords of its constructor, and its name in legends and tables."""

    optimizer: str
    keywords: Mapping[str, Any]
    label: str


def default_settings(preset: str = POINTS) -> list[OptimizerSettings]:
    """Return the default settings: for 2-D functions, those of the Asro paper's figure."""
    if preset == MATRICES:
        return [parse_settings(name, preset) for name in read_preset(preset)["shown"]]
    entries: list[dict[str, Any]] = read_preset(preset)["trajectories"]
    return [_settings(entry.pop("optimizer"), entry, shown=["lr"]) for entry in entries]


def parse_settings(text: str, preset: str = POINTS, *, all_rates: bool = False) -> OptimizerSettings:
    """Parse `NAME` or `NAME:key=value,key=value`, for example `accasro:lr=0.02,betas=0.9,0.99`.

    Missing keywords take the preset's value for that optimizer, or else the constructor's default. With `all_rates`,
    the text must not contain `lr`, and the label does not show it. Raises `UsageError` for an unknown name or keyword,
    or an invalid value, before any computation.
    """
    try:
        name, texts = split_optimizer(text)
        if import_path_of(name) is not None:
            return _imported(name, texts, preset, all_rates)
        defaults, spec = read_preset(preset)["optimizers"], spec_of(name)
        if preset == POINTS and spec.takes_matrices:
            raise ValueError(
                f"{name} updates matrices and cannot move a point; choose from {', '.join(defaults)}; "
                f"or draw a matrix problem: {', '.join(PROBLEMS)}"
            )
        given = _read_keywords(name, texts)
        _refuse_rate(given, all_rates)
        keywords = {"lr": 0.0 if all_rates else spec.defaults["lr"], **defaults.get(name, {}), **given}
        if keywords["lr"] is REQUIRED:
            raise ValueError(f"no default learning rate; give one, as in {name}:lr=0.01")
        settings = _settings(name, keywords, shown=[*([] if all_rates else ["lr"]), *given])
        build(settings, [{"params": [torch.zeros(2, 2)]}], total_steps=1)
    except (TypeError, ValueError) as error:
        raise UsageError(f"--optimizer {text}: {error}") from None
    return settings


def _imported(name: str, texts: Mapping[str, str], preset: str, all_rates: bool) -> OptimizerSettings:
    """Return the settings of an optimizer by import path; raises like `parse_settings`."""
    values = {key: parse_value(text) for key, text in texts.items()}
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    _refuse_rate(given, all_rates)
    lr = given.get("lr", 0.0 if all_rates else default_lr(name))
    keywords = {**given, "lr": _number("lr", lr, str(lr))}
    check_keywords(name, keywords)
    settings = _settings(name, keywords, shown=[*([] if all_rates else ["lr"]), *given])
    try:
        build(settings, [{"params": [torch.zeros((2,) if preset == POINTS else (2, 2), requires_grad=True)]}], 1)
    except UsageError:
        raise
    except Exception as error:  # code of other libraries may raise anything
        raise ValueError(f"its constructor raises {one_line(error)}") from error
    return settings


def _refuse_rate(given: Mapping[str, Any], all_rates: bool) -> None:
    if all_rates and "lr" in given:
        raise ValueError("--lr-grid chooses the learning rate; leave lr out")


def build(settings: OptimizerSettings, groups: Sequence[Mapping[str, Any]], total_steps: int) -> torch.optim.Optimizer:
    """Build the optimizer for parameter groups, which may override any keyword."""
    imported = import_path_of(settings.optimizer) is not None
    cls: Callable[..., torch.optim.Optimizer]
    cls, fixed = (named_constructor(settings.optimizer), {}) if imported else optimizer_class(settings.optimizer)
    keywords = {**fixed, **settings.keywords}
    if "total_steps" in inspect.signature(cls).parameters:
        keywords["total_steps"] = total_steps
    return cls([dict(group) for group in groups], **keywords)


def _settings(name: str, keywords: Mapping[str, Any], shown: Collection[str]) -> OptimizerSettings:
    values = [f"{key} {_plain(value)}" for key, value in keywords.items() if key in shown]
    path = import_path_of(name)
    title = spec_of(name).title if path is None else f"{path.name} ({Path(path.place).name})"
    return OptimizerSettings(name, dict(keywords), ", ".join([title, *values]))


def _plain(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _read_keywords(name: str, texts: Mapping[str, str]) -> dict[str, Any]:
    cls, _ = optimizer_class(name)
    offered = {key: entry for key, entry in inspect.signature(cls).parameters.items() if key not in _NOT_OFFERED}
    keywords: dict[str, Any] = {}
    for key, text in texts.items():
        if key not in offered:
            raise unknown_name(f"keyword of {name}", key, offered)
        keywords[key] = _checked(key, text, offered[key].default)
    return keywords


def _checked(key: str, text: str, default: Any) -> Any:
    """Convert the text to the default's type: a bool, a tuple of numbers, a string, or a number."""
    value = parse_value(text)
    if isinstance(default, str):
        return value if isinstance(value, str) else text  # the constructor checks the string
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ValueError(f"{key} takes true or false, not {text!r}")
        return value
    if not isinstance(default, tuple):
        return _number(key, value, text)
    parts = value if isinstance(value, list) else [parse_value(part.strip()) for part in text.split(",")]
    numbers = tuple(_number(key, part, str(part)) for part in parts)
    if len(numbers) != len(default):
        raise ValueError(f"{key} takes {len(default)} numbers, not {text!r}")
    return numbers


def _number(key: str, value: Any, text: str) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key} takes a number, not {text!r}")
    # An int beyond the largest float cannot be a learning rate either.
    if not abs(value) <= sys.float_info.max:
        raise ValueError(f"{key} takes a finite number, not {text!r}")
    return value
