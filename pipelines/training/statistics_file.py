"""The file of a run's layer statistics: a line that says what was measured on, then a record a line."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, cast

from pipelines.errors import AsgoError
from pipelines.storage import naming, parse_json, refusing_links, write_atomically

STATISTICS = "statistics.jsonl"
"""Its name in the run's folder."""


class Scale(TypedDict):
    """The scales of a parameter's elements: mean, shares at the clamps, and how many are in each bin."""

    mean: float | None
    at_min: float
    at_max: float
    histogram: list[int]


class Preconditioner(TypedDict):
    """The eigenvalues of a factor of side `side`; see `optim.inspection.Spectrum`, whose infinities are None here."""

    side: int
    largest: float | None
    smallest: float | None
    rank: int
    condition: float | None
    largest_condition: float | None


class Layer(TypedDict, total=False):
    """What a step did to one parameter; None stands for a figure that is not finite.

    `grad_norm` is that of the gradient that the optimizer gets, after clipping; `weight_norm` is before the step;
    `update_norm` is that of the change, with weight decay; `update_to_weight` is the change as a share of the weight.
    """

    grad_norm: float | None
    weight_norm: float | None
    update_norm: float | None
    update_to_weight: float | None
    scale: Scale
    preconditioners: dict[str, Preconditioner]


class Record(TypedDict):
    """The step that made `step`: each parameter by name, and the milliseconds that it took to measure."""

    step: int
    cost_ms: float
    layers: dict[str, Layer]


class Header(TypedDict):
    """The shape of each parameter, and the limits of the bins of scales, where the optimizer has any."""

    shapes: dict[str, list[int]]
    scale_edges: list[float] | None


@dataclass(frozen=True)
class Statistics:
    """All that a file holds."""

    header: Header
    records: list[Record]


def continue_statistics(path: Path, step: int) -> None:
    """Drop the records of later steps than `step`, which the run that continues from there makes again."""
    statistics = read_statistics(path)
    if statistics is None:
        path.unlink(missing_ok=True)  # all that there was is half a line
        return
    kept = [record for record in statistics.records if record["step"] <= step]
    write_atomically(path, "".join([_to_line(statistics.header), *map(_to_line, kept)]).encode())


def append_record(path: Path, header: Header, record: Record) -> None:
    """Add a record, after the header where it is the first.

    Raises `AsgoError` if the disk refuses.
    """
    try:
        with open(path, "a", encoding="utf-8", opener=refusing_links) as file:
            file.write((_to_line(header) if file.tell() == 0 else "") + _to_line(record))
    except OSError as error:
        raise AsgoError(f"{path}: {error.strerror}; make room and go on with --resume") from error


def read_statistics(path: Path) -> Statistics | None:
    """What a run's file holds; None if there is none. A last line without its end was torn by a kill, and is dropped.

    Raises `AsgoError` for any other line that is not one of its own.
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
    """The same with None for every float that JSON has no name for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
