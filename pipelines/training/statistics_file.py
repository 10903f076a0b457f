"""The file of a run's layer statistics: JSON lines, a header and then one record per line."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, cast

from pipelines.errors import AsgoError
from pipelines.storage import naming, parse_json, refusing_links, write_atomically

STATISTICS = "statistics.jsonl"
"""Name of the file in the run's folder."""


class Scale(TypedDict):
    """Scales of a parameter's elements: mean, fractions at the clamps, and counts per bin."""

    mean: float | None
    at_min: float
    at_max: float
    histogram: list[int]


class Preconditioner(TypedDict):
    """Eigenvalues of a factor, shape (side, side). Like `optim.inspection.Spectrum`, with None for infinity."""

    side: int
    largest: float | None
    smallest: float | None
    rank: int
    condition: float | None
    largest_condition: float | None


class Layer(TypedDict, total=False):
    """What a step did to one parameter; None for a value that is not finite.

    `grad_norm` is after clipping, `weight_norm` before the step. `update_norm` is the norm of the change, including
    weight decay; `update_to_weight` is `update_norm / weight_norm`.
    """

    grad_norm: float | None
    weight_norm: float | None
    update_norm: float | None
    update_to_weight: float | None
    scale: Scale
    preconditioners: dict[str, Preconditioner]


class Record(TypedDict):
    """Layers by parameter name for the update that made `step`; `cost_ms` is the time of the measurement."""

    step: int
    cost_ms: float
    layers: dict[str, Layer]


class Header(TypedDict):
    """Shape of each parameter, and bin edges of the scales; None if the optimizer has no scales."""

    shapes: dict[str, list[int]]
    scale_edges: list[float] | None


@dataclass(frozen=True)
class Statistics:
    """Content of a file."""

    header: Header
    records: list[Record]


def continue_statistics(path: Path, step: int) -> None:
    """Drop the records after `step`: the resumed run measures those steps again."""
    statistics = read_statistics(path)
    if statistics is None:
        path.unlink(missing_ok=True)  # it has only an incomplete line
        return
    kept = [record for record in statistics.records if record["step"] <= step]
    write_atomically(path, "".join([_to_line(statistics.header), *map(_to_line, kept)]).encode())


def append_record(path: Path, header: Header, record: Record) -> None:
    """Append a record; before the first one, write the header.

    Raises `AsgoError` if writing fails.
    """
    try:
        with open(path, "a", encoding="utf-8", opener=refusing_links) as file:
            file.write((_to_line(header) if file.tell() == 0 else "") + _to_line(record))
    except OSError as error:
        raise AsgoError(f"{path}: {error.strerror}; make room and continue with --resume") from error


def read_statistics(path: Path) -> Statistics | None:
    """Read a run's file; None if there is none. Drops a last line without newline, which a kill left incomplete.

    Raises `AsgoError` for any other line that is not a record.
    """
    if not path.is_file():
        return None
    with naming(path):
        *lines, _torn = path.read_text(encoding="utf-8").split("\n")
    if not lines:
        return None
    header = cast(Header, _parsed(path, 1, lines[0], Header))
    return Statistics(header, [cast(Record, _parsed(path, *line, Record)) for line in enumerate(lines[1:], 2)])


def _parsed(path: Path, number: int, line: str, kind: type) -> dict[str, Any]:
    try:
        value = parse_json(line)
        if not (isinstance(value, dict) and value.keys() == kind.__annotations__.keys()):
            raise ValueError(line)
    except ValueError:
        raise AsgoError(f"{path}:{number}: not a line of layer statistics; remove the file to go without") from None
    return value


def _to_line(value: Header | Record) -> str:
    return json.dumps(_finite(value)) + "\n"


def _finite(value: Any) -> Any:
    """Replace floats that JSON does not have (NaN and infinity) by None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
