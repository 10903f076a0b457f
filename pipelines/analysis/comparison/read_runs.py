"""Read run folders in parallel and fast: a hundred runs of 50,000 steps take seconds."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from pipelines.analysis.comparison.find_runs import is_trial
from pipelines.analysis.comparison.results import Array, Curve, Run, State
from pipelines.analysis.comparison.thinning import Indices, keep_evenly, keep_spikes, moving_mean
from pipelines.config import RunConfig
from pipelines.errors import AsgoError, UsageError
from pipelines.storage import parse_json, printable
from pipelines.tasks import task_of
from pipelines.tasks.metric import LOSS, METRICS, Metric, choose_metric
from pipelines.training.metrics import SPLITS, Split, metric_types, read_lines, rows_to_columns
from pipelines.training.run_folder import RunFolder, checkpoint_folders

Columns = dict[str, np.ndarray[Any, Any]]

_NAMES = ("step", "tokens", "elapsed_s", *METRICS, "step_ms", "optimizer_ms")
"""Metrics that a comparison reads, besides `split`; others are ignored."""
_ARROW_TYPES = {int: pa.int64(), float: pa.float64()}
_TYPES = {"split": pa.string(), **{name: _ARROW_TYPES[metric_types()[name]] for name in _NAMES}}
_NEEDED = ("split", "step", "tokens", "elapsed_s", "loss")
_PARSING = pyarrow.json.ParseOptions(explicit_schema=pa.schema(_TYPES), unexpected_field_behavior="ignore")
_READING = pyarrow.json.ReadOptions(use_threads=False)  # whole runs are read in parallel instead

_AT_ONCE = 4  # runs whose whole files are in memory at once
_FAILURES_SHOWN = 4
_READ = ("fingerprint", "device", "git_commit", "versions", "torch")
_POINTS = 2000
_SMOOTHED_POINTS = 1000
_SMOOTHED = 0.04  # each point of the smoothed curve is a mean over this fraction of the run


def read_runs(paths: Mapping[str, Path], metric: str | None = None) -> tuple[list[Run], list[str]]:
    """Return the runs, and a sentence for each that cannot be read.

    `metric` is the name of the compared metric, that of the runs' task if None. Raises `AsgoError` if no run can be
    read, and `UsageError` if a task does not record the metric.
    """
    with ThreadPoolExecutor(_AT_ONCE) as pool:  # the parser releases Python's lock
        results = list(pool.map(lambda name: _try_to_read(name, paths[name], metric), paths))
    runs = [result for result in results if isinstance(result, Run)]
    failures = [result for result in results if isinstance(result, str)]
    if not runs:
        raise AsgoError(f"none of the runs can be read: {failures[0]}")
    if len(failures) > _FAILURES_SHOWN + 1:
        more = len(failures) - _FAILURES_SHOWN
        failures[_FAILURES_SHOWN:] = [
            f"{more} more unreadable runs are left out; compare one of them alone to see why."
        ]
    return runs, failures


def _try_to_read(name: str, path: Path, metric: str | None) -> Run | str:
    try:
        return read_run(name, path, metric)
    except UsageError:
        raise
    except AsgoError as error:
        return printable(f"{name} is left out: {error}.")
    except OSError as error:
        return printable(f"{name} is left out: {error.filename}: {error.strerror}.")


def read_run(name: str, path: Path, asked: str | None = None) -> Run:
    """Read one run by the metric `asked`. Raises like `read_runs` if its configuration or its metrics are damaged."""
    folder = RunFolder(path)
    config = folder.config()
    metric = choose_metric(task_of(config), asked, "--metric")
    record = parse_json(folder.config_path.read_text(encoding="utf-8"))
    recorded = read_columns(folder.metrics_path) if folder.metrics_path.is_file() else rows_to_columns([])
    require_sound(folder.metrics_path, recorded)
    columns = last_of_each_step(recorded)
    _require_recorded(folder.metrics_path, columns, metric)
    lineage = tuple(folder.lineage())
    own = columns["step"] > (lineage[-1].step if lineage else 0)  # the parent may have another optimizer
    state, reason = _state(folder, config, _curve(columns, "train", LOSS), _curve(columns, "val", LOSS))
    train, val = _finite(_curve(columns, "train", metric)), _finite(_curve(columns, "val", metric))
    smoothed = _smoothed(train, config)
    return Run(
        name=printable(name),
        path=path,
        config=config,
        data=_texts(record.get("data")),
        environment=_texts(record.get("environment")),
        state=state,
        is_trial=is_trial(path),
        train=_take(train, keep_spikes(train.values, _POINTS)),
        smoothed=smoothed,
        val=val,
        lost_rows=int((~np.isfinite(columns[metric.name])).sum()),
        final=float(val.values[-1]) if state == "finished" else None,
        final_train=float(smoothed.values[-1]) if state == "finished" and len(smoothed.values) else None,
        best=metric.best(val.values.tolist()),
        beside=_last(columns, metric.other),
        step_ms=_median(columns["step_ms"][own]),
        optimizer_ms=_median(columns["optimizer_ms"][own]),
        state_bytes=optimizer_state_bytes(folder.checkpoints),
        reason=reason,
        repeated_rows=len(recorded["step"]) - len(columns["step"]),
        lineage=lineage,
        optimizer_sha256=_sha256(record.get("optimizer_source")),
    )


def _texts(record: Any) -> dict[str, Any]:
    """Return the known keys of a table in `config.json` as text: for display only, so any content is accepted."""
    table = record if isinstance(record, dict) else {}
    return {
        key: _texts(value) if isinstance(value, dict) else None if value is None else printable(str(value))
        for key, value in table.items()
        if key in _READ
    }


def _sha256(source: Any) -> str:
    return printable(str(source.get("sha256", "")))[:8] if isinstance(source, dict) else ""


def _rows(columns: Columns, split: Split) -> npt.NDArray[np.intp]:
    return np.flatnonzero(columns["split"] == SPLITS.index(split))


def _curve(columns: Columns, split: Split, metric: Metric) -> Curve:
    rows = _rows(columns, split)
    names = ("step", "tokens", "elapsed_s", metric.name)
    return Curve(*(columns[name][rows].astype(np.float64) for name in names))


def _finite(curve: Curve) -> Curve:
    """Drop values that are not finite: they would spoil the moving mean of their neighbours."""
    return _take(curve, np.flatnonzero(np.isfinite(curve.values)))


def _take(curve: Curve, kept: Indices) -> Curve:
    return Curve(curve.steps[kept], curve.tokens[kept], curve.seconds[kept], curve.values[kept])


def _smoothed(train: Curve, config: RunConfig) -> Curve:
    recorded = config.training.steps / config.metrics.every
    means = replace(train, values=moving_mean(train.values, int(recorded * _SMOOTHED / 2)))
    return _take(means, keep_evenly(train.steps, config.training.steps, _SMOOTHED_POINTS))


def _require_recorded(path: Path, columns: Columns, metric: Metric) -> None:
    """Raise `AsgoError` if a validation has no value; a loss that is not finite is a divergence instead."""
    if metric is not LOSS and np.isnan(columns[metric.name][_rows(columns, "val")]).any():
        raise AsgoError(f"{path}: a validation without {metric.name}; --metric {LOSS.name} compares the {LOSS.plural}")


def _last(columns: Columns, metric: Metric) -> float | None:
    values = columns[metric.name][_rows(columns, "val")]
    return float(values[-1]) if len(values) and np.isfinite(values[-1]) else None


def _median(values: Array) -> float | None:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else None


def _state(folder: RunFolder, config: RunConfig, train: Curve, val: Curve) -> tuple[State, str | None]:
    """Return the state of the run, and why it is not finished."""
    steps = config.training.steps
    divergence = folder.divergence()
    if divergence is not None:
        return "diverged", f"a loss or gradient that is not finite at step {divergence.step:,}"
    if not len(val.steps) and not len(train.steps):
        return "empty", "nothing recorded yet"
    if _is_no_better_than_untrained(val, steps):
        return (
            "diverged",
            f"validation loss {val.values[-1]:.4g} at step {val.steps[-1]:,.0f}, untrained {val.values[0]:.4g}",
        )
    if len(val.steps) and val.steps[-1] == steps:
        return "finished", None
    last = max(curve.steps[-1] for curve in (train, val) if len(curve.steps))
    return "unfinished", f"at step {last:,.0f} of {steps:,}"


def _is_no_better_than_untrained(val: Curve, steps: int) -> bool:
    """Return whether, after half of the steps or more, the loss is not below the untrained model's."""
    return (
        len(val.steps) > 0 and val.steps[0] == 0 and val.steps[-1] >= steps / 2 and not val.values[-1] < val.values[0]
    )


def read_columns(path: Path) -> Columns:
    """Return the columns of a metrics file like `rows_to_columns`; drop an incomplete last line.

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
    """Read line by line, for an error that names the line."""
    try:
        return rows_to_columns(read_lines(path))
    except (ValueError, KeyError, TypeError, OverflowError):
        raise AsgoError(f"{path}: not the metrics of a run") from None


def require_sound(path: Path, columns: Columns) -> None:
    """Raise `AsgoError` that names the line if a count or a time is negative or not finite."""
    for name in ("step", "tokens", "elapsed_s"):
        bad = ~(np.isfinite(columns[name]) & (columns[name] >= 0))
        if bad.any():
            line = int(bad.argmax())
            raise AsgoError(f"{path}:{line + 1}: not the metrics of a run: {name} is {columns[name][line]:g}")


def last_of_each_step(columns: Columns) -> Columns:
    """Return the rows sorted by step, only the last one per step and split: a resumed run repeats steps."""
    if not len(columns["step"]):
        return columns
    places = np.stack([columns["split"], columns["step"]])
    _, from_behind = np.unique(places[:, ::-1], axis=1, return_index=True)
    kept = np.sort(places.shape[1] - 1 - from_behind)
    kept = kept[np.argsort(columns["step"][kept], kind="stable")]
    return {name: column[kept] for name, column in columns.items()}


def optimizer_state_bytes(checkpoints: Path) -> int | None:
    """Return the bytes of the optimizer's tensors in the newest checkpoint; None without one, or if it is damaged.

    A safetensors file is the header's length (8 bytes, little-endian), the header in JSON, and the tensors.
    """
    try:
        folders = checkpoint_folders(checkpoints)
        if not folders:
            return None
        path = folders[-1] / "optimizer.safetensors"
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(min(length, size)))
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return None
    tensors = size - 8 - length
    return tensors if max(ends, default=0) == tensors else None
