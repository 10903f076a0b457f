"""Read run folders in parallel and fast: a hundred runs of 50,000 steps take seconds."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from pipelines.analysis.comparison.find_runs import is_log, is_trial
from pipelines.analysis.comparison.logs.column_names import Names
from pipelines.analysis.comparison.read_logs import read_logged_runs
from pipelines.analysis.comparison.results import Curve, Run, State
from pipelines.analysis.comparison.run_curves import (
    Columns,
    curve_of,
    curves_of,
    is_no_better_than_untrained,
    last_of_each_step,
    last_validation,
    median,
    rows_of,
    worse_than_untrained,
)
from pipelines.config import RunConfig
from pipelines.errors import AsgoError, UsageError
from pipelines.storage import parse_json, printable
from pipelines.tasks import task_of
from pipelines.tasks.metric import ACCURACY, LOSS, Metric, choose_metric
from pipelines.training.metrics import SPLITS, metric_types, read_lines, rows_to_columns
from pipelines.training.run_folder import RunFolder, checkpoint_folders

_NAMES = ("step", "tokens", "elapsed_s", LOSS.name, ACCURACY.name, "step_ms", "optimizer_ms")
"""Metrics that a comparison reads, besides `split`; others are ignored."""
_ARROW_TYPES = {int: pa.int64(), float: pa.float64()}
_TYPES = {"split": pa.string(), **{name: _ARROW_TYPES[metric_types()[name]] for name in _NAMES}}
_NEEDED = ("split", "step", "tokens", "elapsed_s", "loss")
_PARSING = pyarrow.json.ParseOptions(explicit_schema=pa.schema(_TYPES), unexpected_field_behavior="ignore")
_READING = pyarrow.json.ReadOptions(use_threads=False)  # whole runs are read in parallel instead

_AT_ONCE = 4  # runs whose whole files are in memory at once
_FAILURES_SHOWN = 4
_ENVIRONMENT = ("device", "instructions", "torch", "git_commit")


def read_runs(
    paths: Mapping[str, Path], metric: str | None = None, given: Names | None = None
) -> tuple[list[Run], list[str]]:
    """Return the runs of run folders and of logs, and a sentence for each path that cannot be read.

    `metric` is the name of the compared metric. If it is None, it is that of the task of the run folders, or else the
    one by which each log validates. `given` are names of columns of logs.

    Raises `AsgoError` if no run can be read, and `UsageError` if a task does not record the metric, or a log has no
    column of a given name.
    """
    logs = [name for name, path in paths.items() if is_log(path)]
    folders = [name for name in paths if name not in set(logs)]
    common = os.path.commonpath([name.rpartition("/")[0] for name in logs]) if logs else ""
    with ThreadPoolExecutor(_AT_ONCE) as pool:  # the parsers release Python's lock
        results = list(pool.map(lambda name: _try_to_read(name, paths[name], metric), folders))
        if metric is None:
            metric = next((runs[0].metric.name for runs in results if not isinstance(runs, str)), None)
        results += pool.map(lambda name: _try_to_read(name, paths[name], metric, given or {}, common), logs)
    runs = [run for result in results if not isinstance(result, str) for run in result]
    failures = [result for result in results if isinstance(result, str)]
    if not runs:
        raise AsgoError(f"none of the runs can be read: {failures[0]}")
    if len(failures) > _FAILURES_SHOWN + 1:
        more = len(failures) - _FAILURES_SHOWN
        failures[_FAILURES_SHOWN:] = [
            f"{more} more unreadable runs are left out; compare one of them alone to see why."
        ]
    return runs, failures


def _try_to_read(
    name: str, path: Path, metric: str | None, given: Names | None = None, common: str = ""
) -> list[Run] | str:
    """Read a run folder, or a log if there are `given` names; `common` is the folder of all logs."""
    try:
        if given is None:
            return [read_run(name, path, metric)]
        return read_logged_runs(name, path, metric, given, common)
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
    require_recorded(folder.metrics_path, columns, metric)
    lineage = tuple(folder.lineage())
    own = columns["step"] > (lineage[-1].step if lineage else 0)  # the parent may have another optimizer
    state, reason = _state(folder, config, curve_of(columns, "train", LOSS), curve_of(columns, "val", LOSS))
    steps = config.training.steps
    curves = curves_of(columns, metric, steps, steps / config.metrics.every)
    return Run(
        name=printable(name),
        path=path,
        config=config,
        metric=metric,
        optimizer=config.optimizer.name,
        lr=config.optimizer.lr,
        seed=config.seed,
        steps=steps,
        data=_texts(record.get("data"), ("fingerprint",)),
        environment=_environment(record.get("environment")),
        state=state,
        is_trial=is_trial(path),
        train=curves.train,
        smoothed=curves.smoothed,
        val=curves.val,
        lost_rows=int((~np.isfinite(columns[metric.name])).sum()),
        final=curves.final(state),
        final_train=curves.final_train(state),
        best=curves.best,
        beside=last_validation(columns, metric.other),
        step_ms=median(columns["step_ms"][own]),
        optimizer_ms=median(columns["optimizer_ms"][own]),
        state_bytes=optimizer_state_bytes(folder.checkpoints),
        reason=reason,
        repeated_rows=len(recorded["step"]) - len(columns["step"]),
        lineage=lineage,
        optimizer_sha256=_sha256(record.get("optimizer_source")),
    )


def _texts(record: Any, keys: Sequence[str]) -> dict[str, str]:
    """Return values of a table in `config.json` as text: for display only, so any content is accepted."""
    table = record if isinstance(record, dict) else {}
    return {key: printable(str(table[key])) for key in keys if table.get(key) is not None}


def _environment(record: Any) -> dict[str, str]:
    versions = record.get("versions") if isinstance(record, dict) else None
    return {**_texts(record, _ENVIRONMENT), **_texts(versions, ("torch",))}


def _sha256(source: Any) -> str:
    return printable(str(source.get("sha256", "")))[:8] if isinstance(source, dict) else ""


def require_recorded(path: Path, columns: Columns, metric: Metric) -> None:
    """Raise `AsgoError` if a validation has no value; a loss that is not finite is a divergence instead."""
    if metric is not LOSS and np.isnan(columns[metric.name][rows_of(columns, "val")]).any():
        raise AsgoError(f"{path}: a validation without {metric.name}; --metric {LOSS.name} compares the {LOSS.plural}")


def _state(folder: RunFolder, config: RunConfig, train: Curve, val: Curve) -> tuple[State, str | None]:
    """Return the state of the run, and why it is not finished."""
    steps = config.training.steps
    divergence = folder.divergence()
    if divergence is not None:
        return "diverged", f"a loss or gradient that is not finite at step {divergence.step:,}"
    if not len(val.steps) and not len(train.steps):
        return "empty", "nothing recorded yet"
    if is_no_better_than_untrained(val, steps):
        return "diverged", worse_than_untrained(val)
    if len(val.steps) and not np.isfinite(val.values[-1]):
        return "diverged", f"a validation loss that is not finite at step {val.steps[-1]:,.0f}"
    if len(val.steps) and val.steps[-1] == steps:
        return "finished", None
    last = max(curve.steps[-1] for curve in (train, val) if len(curve.steps))
    return "unfinished", f"at step {last:,.0f} of {steps:,}"


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
