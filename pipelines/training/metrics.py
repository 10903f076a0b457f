"""The metrics of a run: in memory, as JSON lines, and as the columns of a checkpoint.

`Row` is the one declaration of the columns: files, checkpoints, the CSV and the trackers derive theirs from it.
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
"""What stands in a column, by its type, for a row without a value."""


class Counts(TypedDict):
    """How far a run has come: passes over the data in `epoch`, seconds spent in training steps in `elapsed_s`."""

    step: int
    tokens: int
    samples: int
    epoch: float
    elapsed_s: float


class Row(Counts, total=False):
    """One record. A `train` row is the update that made `step`; a `val` row is the model after `step` updates.

    `loss` is in nats a token or an image; `accuracy` and `top5_accuracy` are shares; `step_ms` and `optimizer_ms` are
    means since the last training row, without evaluation and saving; `throughput` is in tokens (or images) a second
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
    """The columns but `split`, `int` or `float` each, in the order of `Row`."""
    return {key: kind for key, kind in get_type_hints(Row).items() if key != "split"}


def rows_to_columns(rows: list[Row]) -> dict[str, np.ndarray[Any, Any]]:
    """Rows as arrays of equal length: `split` as codes, int64 with its least for no value, float64 with NaN for it."""
    columns: dict[str, np.ndarray[Any, Any]] = {
        "split": np.array([SPLITS.index(row["split"]) for row in rows], np.uint8)
    }
    for key, kind in metric_types().items():
        columns[key] = np.array([row.get(key, _MISSING[kind]) for row in rows], np.dtype(kind))
    return columns


def columns_to_rows(columns: dict[str, np.ndarray[Any, Any]]) -> list[Row]:
    """The inverse of `rows_to_columns`. Other versions of asgo may lack columns, or have more."""
    rows = [cast(Row, {"split": SPLITS[code]}) for code in columns["split"]]
    for key, kind in metric_types().items():
        if key in columns:
            for row, value in zip(rows, columns[key].tolist(), strict=True):
                if value == value and value != _MISSING[kind]:  # NaN is not equal to itself
                    row[key] = value  # type: ignore[literal-required]
    return rows


def to_line(row: Row) -> str:
    """A row as one line of JSON, in the order of `Row`; floats read back as the same floats."""
    return json.dumps({key: row[key] for key in Row.__annotations__ if key in row}) + "\n"  # type: ignore[literal-required]


def to_lines(rows: Iterable[Row]) -> bytes:
    """Rows as the content of a metrics file."""
    return "".join(map(to_line, rows)).encode()


def read_lines(path: Path) -> list[Row]:
    """The rows of a metrics file. A last line without its end was torn by a kill, and is dropped.

    Raises `AsgoError` for any other line that is not a row.
    """
    with naming(path):
        *lines, _torn = path.read_bytes().split(b"\n")
    needed = {"split", *(key for key, kind in get_type_hints(Counts).items() if kind is int)}
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line)
            if not (isinstance(row, dict) and needed <= row.keys() <= Row.__annotations__.keys()):
                raise ValueError(line)
            rows.append(cast(Row, row))
        except ValueError:
            raise AsgoError(f"{path}:{number}: not a line of metrics; remove the line to read the rest") from None
    return rows
