"""Read a TOML file as one model of settings, with one line for each problem."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from pipelines.config import Settings
from pipelines.errors import UsageError
from pipelines.optimizers import parse_toml

S = TypeVar("S", bound=Settings)

_MOST_BYTES = 1 << 20


def read_settings(path: Path, kind: type[S]) -> S:
    """Read and validate a file. Raises `UsageError` with one line for each problem."""
    try:
        with path.open("rb") as file:
            return kind.model_validate(parse_toml(file.read(_MOST_BYTES).decode("utf-8-sig")))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        lines = (line.removeprefix(".").removeprefix(": ") for line in validation_lines(error, ""))
        raise UsageError("\n".join(f"{path}: {line}" for line in lines)) from None
    except ValueError as error:
        raise UsageError(f"{path}: not valid TOML: {error}") from None


def validation_lines(error: ValidationError, place: str) -> Iterable[str]:
    """Yield a line for each error, with the key in the table `place`."""
    for details in error.errors():
        where = ".".join([place, *map(str, details["loc"])])
        message = details["msg"].removeprefix("Input ").removeprefix("Value error, ")
        if details["type"] == "missing":
            yield f"{where} is missing"
        elif details["type"] == "extra_forbidden":
            yield f"{where}: unknown key"
        elif details["type"] == "value_error":
            yield f"{where}: {message}"
        else:
            yield f"{where} = {details['input']!r}: {message}"
