"""The records of a run as columns, fast: a hundred runs of 50,000 steps take seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from pipelines.errors import AsgoError
from pipelines.training.metrics import SPLITS, metric_types, read_lines, rows_to_columns

Columns = dict[str, np.ndarray[Any, Any]]

_NAMES = ("step", "tokens", "elapsed_s", "loss", "accuracy", "step_ms", "optimizer_ms")
"""What a comparison reads, besides `split`; the other metrics are passed over."""
_ARROW_TYPES = {int: pa.int64(), float: pa.float64()}
_TYPES = {"split": pa.string(), **{name: _ARROW_TYPES[metric_types()[name]] for name in _NAMES}}
_NEEDED = ("split", "step", "tokens", "elapsed_s", "loss")
_PARSING = pyarrow.json.ParseOptions(explicit_schema=pa.schema(_TYPES), unexpected_field_behavior="ignore")
_READING = pyarrow.json.ReadOptions(use_threads=False)  # runs are read side by side instead


def read_columns(path: Path) -> Columns:
    """The columns of a metrics file as `rows_to_columns` makes them; a torn last line is dropped.

    Raises `AsgoError` for a line that is not a row.
    """
    content = path.read_bytes()
    whole = pa.py_buffer(content).slice(0, content.rfind(b"\n") + 1)
    if not whole.size:
        return rows_to_columns([])
    try:
        table = pyarrow.json.read_json(pa.BufferReader(whole), _READING, _PARSING)
    except pa.ArrowInvalid:
        return _read_slowly(path)
    codes = pc.index_in(table["split"], value_set=pa.array(SPLITS))
    if codes.null_count or any(table[name].null_count for name in _NEEDED):
        return _read_slowly(path)
    return {name: table[name].to_numpy() for name in _TYPES} | {"split": codes.to_numpy()}


def _read_slowly(path: Path) -> Columns:
    """A line at a time, which can say what is wrong with which."""
    try:
        return rows_to_columns(read_lines(path))
    except (ValueError, KeyError, TypeError, OverflowError):
        raise AsgoError(f"{path}: not the metrics of a run") from None


def require_sound(path: Path, columns: Columns) -> None:
    """Raise `AsgoError` with the line that has a count, or seconds, below 0 or not finite."""
    for name in ("step", "tokens", "elapsed_s"):
        bad = ~(np.isfinite(columns[name]) & (columns[name] >= 0))
        if bad.any():
            line = int(bad.argmax())
            raise AsgoError(f"{path}:{line + 1}: not the metrics of a run: {name} is {columns[name][line]:g}")


def last_of_each_step(columns: Columns) -> Columns:
    """Ascending in the steps, each with the last of its rows of a split: a later one was made in place of others."""
    if not len(columns["step"]):
        return columns
    places = np.stack([columns["split"], columns["step"]])
    _, from_behind = np.unique(places[:, ::-1], axis=1, return_index=True)
    kept = np.sort(places.shape[1] - 1 - from_behind)
    kept = kept[np.argsort(columns["step"][kept], kind="stable")]
    return {name: column[kept] for name, column in columns.items()}
