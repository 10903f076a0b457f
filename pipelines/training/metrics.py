"""The metrics of a run: in memory, as JSON lines, and as arrays in a checkpoint.

`Row` declares the columns. Files, checkpoints, the CSV and the trackers derive theirs from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypedDict, cast, get_type_hints

import numpy as np

from pipelines.errors import AsgoError
from pipelines.storage import naming, parse_json

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
_MISSING = {int: np.iinfo(np.int64).min, float: np.nan}
"""Placeholder of a missing value in a column, by type."""


class Counts(TypedDict):
    """Progress of a run. `epoch` counts passes over the data; `elapsed_s` is in seconds of training steps."""

    step: int
    tokens: int
    samples: int
    epoch: float
    elapsed_s: float


class Row(Counts, total=False):
    """Row of metrics: `train`, of the update that made `step`; `val`, of the model after `step` updates.

    `loss` is in nats per token or image; `accuracy` and `top5_accuracy` are fractions; `step_ms` and `optimizer_ms` are
    means since the last training row, without evaluation and saving; `throughput` is in tokens (or images) per second
    over the same time. `elapsed_s` counts over all resumes.
    """

    split: Split
    loss: float
    accuracy: float
    lr: float
    grad_norm: float
    step_ms: float
    optimizer_ms: float
    throughput: float
    top5_accuracy: float


def metric_types() -> dict[str, type]:
    """Return the type (`int` or `float`) of each column except `split`, in the order of `Row`."""
    return {key: kind for key, kind in get_type_hints(Row).items() if key != "split"}


def rows_to_columns(rows: list[Row]) -> dict[str, np.ndarray[Any, Any]]:
    """Return rows as uint8 (`split`), int64 and float64 arrays of equal length, `_MISSING` for missing values."""
    columns: dict[str, np.ndarray[Any, Any]] = {
        "split": np.array([SPLITS.index(row["split"]) for row in rows], np.uint8)
    }
    for key, kind in metric_types().items():
        columns[key] = np.array([row.get(key, _MISSING[kind]) for row in rows], np.dtype(kind))
    return columns


def columns_to_rows(columns: dict[str, np.ndarray[Any, Any]]) -> list[Row]:
    """Invert `rows_to_columns`. Columns of other versions of asgo may be missing or unknown."""
    rows = [cast(Row, {"split": SPLITS[code]}) for code in columns["split"]]
    for key, kind in metric_types().items():
        if key in columns:
            for row, value in zip(rows, columns[key].tolist(), strict=True):
                if value == value and value != _MISSING[kind]:  # NaN is not equal to itself
                    row[key] = value  # type: ignore[literal-required]
    return rows


def to_line(row: Row) -> str:
    """Return a row as one line of JSON, in the order of `Row`. Floats are exact."""
    return json.dumps({key: row[key] for key in Row.__annotations__ if key in row}) + "\n"  # type: ignore[literal-required]


def to_lines(rows: Iterable[Row]) -> bytes:
    """Return rows as the content of a metrics file."""
    return "".join(map(to_line, rows)).encode()


def read_lines(path: Path) -> list[Row]:
    """Read the rows of a metrics file. Drops a last line without newline, which a kill left incomplete.

    Raises `AsgoError` for any other line that is not a row.
    """
    with naming(path):
        *lines, _torn = path.read_bytes().split(b"\n")
    required = {"split", *(key for key, kind in get_type_hints(Counts).items() if kind is int)}
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line)
            if not (isinstance(row, dict) and required <= row.keys() <= Row.__annotations__.keys()):
                raise ValueError(line)
            rows.append(cast(Row, row))
        except ValueError:
            raise AsgoError(f"{path}:{number}: not a line of metrics; remove the line to read the rest") from None
    return rows
