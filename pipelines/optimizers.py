"""Optimizers as a user writes them, `NAME` or `NAME:key=value,...`. Needs neither torch nor pydantic."""

from __future__ import annotations

import contextlib
import re
import tomllib
from typing import Any

from optim.specs import OPTIMIZER_NAMES as OPTIMIZER_NAMES
from optim.specs import SPECS

OWN_NAMES = tuple(spec.name for spec in SPECS.values() if spec.is_own)
"""Of those that `optim` implements; the others are PyTorch's."""

DEEPEST = 16
"""More tables in tables than any settings have."""

_SHORT_FLOAT = re.compile(r"[+-]?(\d+\.|\.\d+)([eE][+-]?\d+)?")
"""Floats of Python that TOML does not have: `.5` and `5.`."""


def split_optimizer(text: str) -> tuple[str, dict[str, str]]:
    """The name and the keywords of `NAME` or `NAME:key=value,key=value`, for example `adam:lr=0.1,betas=0.9,0.99`.

    `parse_value` reads the values. Raises `ValueError` for an item without `=`.
    """
    name, _, listed = text.partition(":")
    keywords = {}
    # A comma separates keywords, and also the numbers of one keyword: it is the former where a key follows.
    for item in re.split(r",(?=[^,=]*=)", listed) if listed else []:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise ValueError(f"{item!r} is not key=value")
        keywords[key] = value
    return name, keywords


def parse_value(text: str) -> Any:
    """A value of TOML, or as in Python `True` and `.5`; several numbers with commas as a list; else the text itself.

    `0.9,0.95`, `[0.9, 0.95]` and `(0.9, 0.95)` are the same.
    """
    with contextlib.suppress(ValueError):
        return parse_toml(f"value = {text}")["value"]
    if text in ("True", "False"):
        return text == "True"
    if _SHORT_FLOAT.fullmatch(text):
        return float(text)
    inner = text[1:-1] if text[:1] + text[-1:] in ("[]", "()") else text
    values = [parse_value(part.strip()) for part in inner.split(",")] if "," in inner else []
    return values if values and all(isinstance(value, int | float) for value in values) else text


def parse_toml(text: str) -> dict[str, Any]:
    """The tables of a text. Raises `ValueError` for what is not TOML, or is nested deeper than any settings are."""
    with contextlib.suppress(RecursionError):
        tables = tomllib.loads(text)
        level: list[Any] = [tables]
        for _ in range(DEEPEST):
            level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]
            level = [inner for inner in level if isinstance(inner, dict | list)]
        if not level:
            return tables
    raise ValueError("nested too deeply")
