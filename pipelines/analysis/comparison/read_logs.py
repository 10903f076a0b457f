"""Read the runs of logs of other programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipelines.analysis.comparison.logs.column_names import Names
from pipelines.analysis.comparison.logs.log import Log
from pipelines.analysis.comparison.logs.read_log import read_log
from pipelines.analysis.comparison.logs.run_names import split_path
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
from pipelines.errors import AsgoError, UsageError
from pipelines.storage import printable
from pipelines.tasks.metric import BPB, LOSS, METRICS, Metric


def read_logged_runs(name: str, path: Path, asked: str | None, given: Names, common: str = "") -> list[Run]:
    """Read the runs of one log by the metric `asked`, or else by loss, or by bits per byte if they validate only by it.

    `name` is its relative path. Below the folder `common`, it names the contender, if the log does not.

    Raises `AsgoError` if the log cannot be read or does not validate by the metric, and `UsageError` like `read_log`.
    """
    named = split_path(name[len(common) :], path)
    return [_run(name, path, log, asked, named) for log in read_log(path, given)]


def _run(name: str, path: Path, log: Log, asked: str | None, named: tuple[str, int | None]) -> Run:
    _require_sound(path, log.columns)
    columns = last_of_each_step(log.columns)
    metric = _metric(path, columns, asked)
    contender, seed = named
    train, val = curve_of(columns, "train", LOSS), curve_of(columns, "val", BPB if metric is BPB else LOSS)
    last = max(columns["step"], default=0)
    state, reason = _state(log, max(last, log.reached), train, val)
    curves = curves_of(columns, metric, log.steps or last, len(train.steps))
    return Run(
        name=printable(f"{name}:{log.name}" if log.name else name),
        path=path,
        config=None,
        metric=metric,
        optimizer=printable(log.contender or contender),
        lr=None,
        seed=seed if log.seed is None and not log.name else log.seed,
        steps=log.steps,
        data={},
        environment={},
        state=state,
        is_trial=False,
        train=curves.train,
        smoothed=curves.smoothed,
        val=curves.val,
        final=curves.final(state),
        final_train=curves.final_train(state),
        best=curves.best,
        beside=last_validation(columns, metric.other),
        step_ms=median(columns["step_ms"][rows_of(columns, "train")]),
        optimizer_ms=median(columns["optimizer_ms"][rows_of(columns, "train")]),
        state_bytes=None,
        reason=reason,
        lost_rows=int((~np.isfinite([columns[name] for name in METRICS]).any(axis=0)).sum()),
        repeated_rows=len(log.columns["step"]) - len(columns["step"]),
    )


def _require_sound(path: Path, columns: Columns) -> None:
    """Raise `AsgoError` if a step is not a whole number, or a count or a time is negative or infinite."""
    steps = columns["step"]
    bad = steps[~(np.isfinite(steps) & (steps >= 0) & (steps < 2**53) & (steps == np.floor(steps)))]
    if len(bad):
        raise AsgoError(f"{path}: step {bad[0]:g} is not a whole number from 0")
    for name in ("tokens", "elapsed_s"):
        bad = columns[name][(columns[name] < 0) | np.isinf(columns[name])]
        if len(bad):
            raise AsgoError(f"{path}: {name} is {bad[0]:g}")


def _metric(path: Path, columns: Columns, asked: str | None) -> Metric:
    val = rows_of(columns, "val")
    recorded = [name for name in METRICS if not np.isnan(columns[name][val]).all()]
    if asked is None:
        return BPB if recorded and LOSS.name not in recorded and BPB.name in recorded else LOSS
    if asked not in METRICS:
        raise UsageError(f"--metric {asked}: unknown metric; choose {' or '.join(METRICS)}")
    if len(val) and asked not in recorded and recorded:
        raise AsgoError(f"{path}: no validation by {asked}; it validates by {' and '.join(recorded)}")
    return METRICS[asked]


def _state(log: Log, last: float, train: Curve, val: Curve) -> tuple[State, str | None]:
    """Return the state of the run, and why it is not finished. A log that does not say the length is at its end."""
    if not len(train.steps) and not len(val.steps):
        return "empty", "nothing recorded yet"
    for curve in (train, val):
        if len(curve.steps) and not np.isfinite(curve.values[-1]):
            return "diverged", f"a loss that is not finite at step {curve.steps[-1]:,.0f}"
    if is_no_better_than_untrained(val, log.steps or last or 1):
        return "diverged", worse_than_untrained(val)
    if not len(val.steps):
        return "unfinished", "no validation in the log; --columns val.loss=NAME names its column"
    if log.steps is not None and last < log.steps:
        return "unfinished", f"at step {last:,.0f} of {log.steps:,}"
    return "finished", None


def without_cut_short(runs: Sequence[Run]) -> list[Run]:
    """Return the runs; those that end before another log of their contender are unfinished, if no length is known."""
    ends: dict[str, float] = {}
    for run in runs:
        if _has_unknown_length(run):
            ends[run.optimizer] = max(ends.get(run.optimizer, 0), run.val.steps[-1])
    return [
        replace(run, state="unfinished", final=None, final_train=None, reason=_cut_short(run, ends[run.optimizer]))
        if _has_unknown_length(run) and run.val.steps[-1] < ends[run.optimizer]
        else run
        for run in runs
    ]


def _has_unknown_length(run: Run) -> bool:
    return run.config is None and run.steps is None and run.state == "finished"


def _cut_short(run: Run, end: float) -> str:
    return f"validates last at step {run.val.steps[-1]:,.0f}, another run of {run.optimizer} at {end:,.0f}"
