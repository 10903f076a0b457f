"""Names of optimizers, import paths, and `NAME:key=value,...`. Imports neither torch nor pydantic."""

from __future__ import annotations

import contextlib
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from optim.specs import OPTIMIZER_NAMES as OPTIMIZER_NAMES
from optim.specs import SPECS

OWN_NAMES = tuple(spec.name for spec in SPECS.values() if spec.is_own)
"""Names of the optimizers that `optim` implements; the others are PyTorch's."""

DEEPEST = 16
"""Limit of nesting; no settings are nested deeper."""

_SHORT_FLOAT = re.compile(r"[+-]?(\d+\.|\.\d+)([eE][+-]?\d+)?")
"""Python floats that TOML does not have: `.5` and `5.`."""


_DOTS_OUTSIDE_QUOTES = re.compile(r'\.(?=[^"]*(?:"[^"]*"[^"]*)*$)')
_IMPORT_PATH = re.compile(r"(?P<place>.+\.py):(?P<file_class>\w+)|(?P<module>\w+(?:\.\w+)*)[.:](?P<name>\w+)")


@dataclass(frozen=True)
class ImportPath:
    """A class of optimizers: `module.Class`, `module:Class` or `FILE.py:Class`."""

    place: str
    """A module, or a path that ends in `.py`."""
    name: str

    @property
    def is_file(self) -> bool:
        """Whether the place is a file."""
        return self.place.endswith(".py")


def import_path_of(name: str) -> ImportPath | None:
    """Return the parts of an import path; None for the name of an own optimizer, or text that is neither."""
    found = None if name in OPTIMIZER_NAMES else _IMPORT_PATH.fullmatch(name)
    if found is None:
        return None
    return ImportPath(found["place"] or found["module"], found["file_class"] or found["name"])


def short_name_of(name: str) -> str:
    """Return the name of an optimizer; of an import path, its class."""
    path = import_path_of(name)
    return name if path is None else path.name


def split_optimizer(text: str) -> tuple[str, dict[str, str]]:
    """Split `NAME` or `NAME:key=value,key=value` into name and keywords; for example `adam:lr=0.1,betas=0.9,0.99`.

    NAME may be an import path, such as `my_module:MyOptimizer`. `parse_value` reads the values. Raises `ValueError` for
    an item without `=`.
    """
    name, _, listed = text.partition(":")
    class_name, _, rest = listed.partition(":")
    if name not in OPTIMIZER_NAMES and class_name.isidentifier():
        name, listed = f"{name}:{class_name}", rest
    keywords = {}
    # A comma separates keywords, but also the numbers of one keyword. It separates keywords if a key follows.
    for item in re.split(r",(?=[^,=]*=)", listed) if listed else []:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise ValueError(f"{item!r} is not key=value")
        keywords[key] = value
    return name, keywords


def split_key(key: str) -> list[str]:
    """Split a dotted key; a part with dots is in double quotes, as in TOML: `optimizers."heavyball.SOAP".lr`."""
    return [part.strip('"') for part in _DOTS_OUTSIDE_QUOTES.split(key)]


def join_key(parts: Iterable[str]) -> str:
    """Join parts to a dotted key; the inverse of `split_key`."""
    return ".".join(f'"{part}"' if "." in part else part for part in parts)


def short_key(key: str) -> str:
    """Return the last part of a key; with the part of the model before it, as in `embedding.lr`."""
    return key.removeprefix("optimizer.parts.") if key.startswith("optimizer.parts.") else key.split(".")[-1]


def parse_value(text: str) -> Any:
    """Parse a TOML value, Python's `True`, `False` and `.5`, or numbers with commas (a list); else return the text.

    `0.9,0.95`, `[0.9, 0.95]` and `(0.9, 0.95)` are the same list.
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
    """Parse TOML. Raises `ValueError` if it is not valid, or nested deeper than `DEEPEST`."""
    with contextlib.suppress(RecursionError):
        tables = tomllib.loads(text)
        level: list[Any] = [tables]
        for _ in range(DEEPEST):
            level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]
            level = [inner for inner in level if isinstance(inner, dict | list)]
        if not level:
            return tables
    raise ValueError("nested too deeply")
