"""Send the metrics of a run to TensorBoard and Weights & Biases: everything that metrics.jsonl has."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Protocol

from pipelines.config import RunConfig
from pipelines.errors import AsgoError, UsageError
from pipelines.shell import command
from pipelines.storage import write_atomically
from pipelines.training.distributed import Ranks
from pipelines.training.metrics import Row
from pipelines.training.reporter import Reporter

_TENSORBOARD_FLUSH_S = 10
_WANDB_INIT_S = 30.0
_WANDB_FINISH_S = 20.0
"""Less than the 30 s from the launcher's SIGTERM to its SIGKILL; `wandb sync` uploads the rest."""


class Tracker(Protocol):
    """Receives the metrics of one run. If a method raises, the run drops the tracker and continues."""

    def record(self, row: Row) -> None:
        """Record a row."""

    def close(self, failed: bool) -> None:
        """Finish; `failed` if the run ended with an error."""


def require_trackers(names: Sequence[str]) -> None:
    """Raise `UsageError` if the package of a tracker is not installed."""
    for name in names:
        try:
            distribution(name)
        except PackageNotFoundError:
            raise UsageError(f"--track {name}: not installed; pip install 'asgo[{name}]'") from None


@contextlib.contextmanager
def tracked(reporter: Reporter, config: RunConfig, run: Path, rows: Sequence[Row], ranks: Ranks) -> Iterator[Reporter]:
    """Context manager that yields a reporter which also sends rows to the trackers of the configuration.

    The trackers first receive `rows`, the metrics so far. A tracker that fails is dropped with a warning. Only rank 0
    has trackers.
    """
    both = _TrackedReporter(reporter)
    for name in dict.fromkeys(config.runtime.track if ranks.is_first else ()):
        with _forgiving(name):
            both.trackers[name] = _TRACKERS[name](run, config, rows, reporter)
    try:
        yield both
    except BaseException:
        both.close(failed=True)
        raise
    both.close(failed=False)


class _TrackedReporter:
    """Forwards events to a reporter, and rows also to the trackers."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self.trackers: dict[str, Tracker] = {}
        self.begin, self.note, self.hung = reporter.begin, reporter.note, reporter.hung

    def trained(self, row: Row) -> None:
        self._reporter.trained(row)
        self._record(row)

    def validated(self, row: Row) -> None:
        self._reporter.validated(row)
        self._record(row)

    def close(self, failed: bool) -> None:
        for name, tracker in self.trackers.items():
            with _forgiving(name):
                tracker.close(failed)

    def _record(self, row: Row) -> None:
        for name in list(self.trackers):
            tracker = self.trackers.pop(name)
            with _forgiving(name):
                tracker.record(row)
                self.trackers[name] = tracker


@contextlib.contextmanager
def _forgiving(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        warnings.warn(f"{name} is dropped, the run continues: {reason}", stacklevel=2)


def _metrics(row: Row) -> dict[str, float]:
    """Return the metrics of a row by the names that trackers group: train/loss, val/loss, ..."""
    return {f"{row['split']}/{key}": value for key, value in row.items() if key not in ("split", "step")}  # type: ignore[misc]


class _TensorBoard:
    """Event files in RUN/tensorboard, written in a thread.

    A resumed run begins a new file with all its rows: the curves have no gaps, and no step appears twice.
    """

    def __init__(self, run: Path, config: RunConfig, rows: Sequence[Row], reporter: Reporter) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run / "tensorboard"
        # Keep the newest old file: a running TensorBoard reads it, then the new one; `purge_step` drops the old steps.
        for earlier in sorted(folder.glob("events.out.tfevents.*"))[:-1]:
            earlier.unlink()
        self._writer = SummaryWriter(folder, purge_step=0, flush_secs=_TENSORBOARD_FLUSH_S)
        now = time.time()
        for row in rows:
            self._add(row, now - rows[-1]["elapsed_s"] + row["elapsed_s"])

    def record(self, row: Row) -> None:
        self._add(row, time.time())

    def _add(self, row: Row, wall_time: float) -> None:
        for name, value in _metrics(row).items():
            self._writer.add_scalar(name, value, row["step"], wall_time)

    def close(self, failed: bool) -> None:
        self._writer.close()


class _Wandb:
    """A run of Weights & Biases in RUN/wandb. Another process uploads it, unless WANDB_MODE=offline.

    A resumed run keeps its id. The server has the rows of earlier processes and rejects them a second time. An offline
    process writes all rows: its folder alone is the whole run.
    """

    def __init__(self, run: Path, config: RunConfig, rows: Sequence[Row], reporter: Reporter) -> None:
        import wandb  # takes a second

        settings = wandb.Settings(
            silent=True, console="off", init_timeout=_WANDB_INIT_S, finish_timeout=_WANDB_FINISH_S
        )
        mode = wandb.setup(settings).settings.mode
        if mode == "online" and not wandb.login(prompt=False, verify=False):  # `init` verifies the key
            raise AsgoError("no API key; `wandb login`, or set WANDB_API_KEY, or WANDB_MODE=offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "asgo"),
            name=run.resolve().name,
            id=_wandb_id(run / "wandb"),
            resume="allow",
            dir=str(run),
            config=config.model_dump(mode="json"),
            settings=settings,
        )
        self._run.define_metric("*", step_metric="step")
        self._known = self._run.step
        for row in rows:
            self.record(row)
        if self._run.offline:
            reporter.note(f"wandb: offline; upload with: {command('wandb', 'sync', run / 'wandb' / 'latest-run')}")
        elif self._run.url:  # None with WANDB_MODE=disabled
            reporter.note(f"wandb: {self._run.url}")

    def record(self, row: Row) -> None:
        if self._known:
            self._known -= 1
        else:
            self._run.log({"step": row["step"], **_metrics(row)})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _wandb_id(folder: Path) -> str:
    """Return the id of the run in Weights & Biases; the run folder stores it."""
    path = folder / "run-id"
    if not path.exists():
        folder.mkdir(exist_ok=True)
        write_atomically(path, secrets.token_hex(8).encode())
    return path.read_text(encoding="utf-8")


_TRACKERS: dict[str, Callable[[Path, RunConfig, Sequence[Row], Reporter], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
}
