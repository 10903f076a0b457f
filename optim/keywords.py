"""What each keyword of an optimizer may be, and the error for one that it may not be."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

import torch

RootMethod = Literal["auto", "eigh", "polar_express", "newton_schulz", "newton"]

MATRIX_KEYS = ("rule", "row_blocks", "batch_dims")
"""Keys of parameter groups that mean something to a matrix optimizer alone."""

_Rule = tuple[str, Callable[[Any], bool]]


def _is_number(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and value.is_floating_point()
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_decay(value: Any) -> bool:
    return _is_number(value) and 0.0 <= value < 1.0


def _is_blocks(value: Any) -> bool:
    sizes = value if isinstance(value, tuple | list) else [value]
    return value is None or (len(sizes) > 0 and all(_is_whole(size) and size >= 1 for size in sizes))


_NOT_NEGATIVE: _Rule = ("a finite number >= 0", lambda value: _is_number(value) and value >= 0.0)
_DECAY: _Rule = ("a number in [0, 1)", _is_decay)
_COUNT: _Rule = ("a whole number >= 0", lambda value: _is_whole(value) and value >= 0)
_POSITIVE_COUNT: _Rule = ("a whole number >= 1", lambda value: _is_whole(value) and value >= 1)
_SCALE: _Rule = ("a finite number > 0", lambda value: _is_number(value) and value > 0.0)
_FLAG: _Rule = ("True or False", lambda value: isinstance(value, bool))

_RULES: dict[str, _Rule] = {
    "lr": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "eps": _NOT_NEGATIVE,
    "increment": _NOT_NEGATIVE,
    "decrement": _NOT_NEGATIVE,
    "min_scale": _NOT_NEGATIVE,
    "max_scale": _SCALE,
    "momentum": _DECAY,
    "beta2": _DECAY,
    "betas": (
        "two numbers in [0, 1)",
        lambda value: isinstance(value, tuple | list) and len(value) == 2 and all(map(_is_decay, value)),
    ),
    "nesterov": _FLAG,
    "maximize": _FLAG,
    "capturable": _FLAG,
    "row_blocks": ("a number of equal blocks of rows, or the rows of each block", _is_blocks),
    "batch_dims": _COUNT,
    "ns_steps": _POSITIVE_COUNT,
    "root_steps": _POSITIVE_COUNT,
    "precond_frequency": _POSITIVE_COUNT,
    "total_steps": _POSITIVE_COUNT,
    "scale_start_step": _COUNT,
    "root_method": (f"one of {', '.join(get_args(RootMethod))}", lambda value: value in get_args(RootMethod)),
}


def check_keywords(values: Mapping[str, Any]) -> None:
    """Raise `ValueError`, naming keyword and value, for the first value that its keyword cannot take."""
    for name, value in values.items():
        wanted, accepts = _RULES.get(name, ("", lambda _: True))
        if not accepts(value):
            if isinstance(value, torch.Tensor) and value.numel() != 1:  # its numbers may fill many lines
                shape = tuple(value.shape)
                raise ValueError(f"invalid {name}: it must be {wanted}; a Tensor {name} must be 1-element, not {shape}")
            raise ValueError(f"invalid {name}: {value!r}; it must be {wanted}")
    if "min_scale" in values:
        min_scale, max_scale = values["min_scale"], values.get("max_scale", 1.0)
        if min_scale > max_scale:
            raise ValueError(f"invalid min_scale: {min_scale!r} is above max_scale, {max_scale!r}")
    if values.get("capturable") and values.get("precond_frequency", 1) != 1:
        raise ValueError("invalid precond_frequency: a CUDA graph repeats one step, so capturable=True needs 1")


def misspelled(key: str, keywords: Iterable[str]) -> str | None:
    """The keyword that a parameter group's key misspells; None for a keyword, and for a key that others read.

    Training loops and schedulers keep keys of their own in groups (`name`, `lr_scale`, `max_lr`): only what is nearly
    a keyword is taken for a mistake. A keyword with other words, such as `weight_decay_mult`, is none, and a keyword of
    two or three letters is too short to be nearly another word.
    """
    if any(f"_{keyword}_" in f"_{key}_" for keyword in keywords):
        return None
    long = [keyword for keyword in keywords if len(keyword) > 3 or keyword == key.lower()]
    return next(iter(difflib.get_close_matches(key.lower(), long, n=1, cutoff=0.85)), None)


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for a name that does not exist, with the nearest one that does."""
    known = list(known)
    nearest = difflib.get_close_matches(name.lower(), known, n=1)
    more = f" and {len(known) - 20} more" if len(known) > 20 else ""
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(known[:20])}{more}"
    return ValueError(f"unknown {kind}: {name!r}; {hint}")
