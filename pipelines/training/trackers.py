"""The records of a run, sent to TensorBoard and Weights & Biases as well: what metrics.jsonl gets, they get."""

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
"""Less than the 30 s from the SIGTERM that torchrun passes on to its SIGKILL; `wandb sync` uploads the rest."""


class Tracker(Protocol):
    """Shows the records of one run somewhere. Whatever its methods raise costs the tracker, never the run."""

    def record(self, row: Row) -> None:
        """Take the next record."""

    def close(self, failed: bool) -> None:
        """Finish what was taken; `failed` says that the run ended by an error."""


def require_trackers(names: Sequence[str]) -> None:
    """`UsageError` if the package of a tracker is not installed."""
    for name in names:
        try:
            distribution(name)
        except PackageNotFoundError:
            raise UsageError(f"--track {name}: not installed; pip install 'asgo[{name}]'") from None


@contextlib.contextmanager
def tracked(reporter: Reporter, config: RunConfig, run: Path, rows: Sequence[Row], ranks: Ranks) -> Iterator[Reporter]:
    """A reporter that also sends records to the trackers of the configuration, after `rows`, those of the run so far.

    A tracker that fails is dropped with a warning. Of several processes, the first one alone has trackers.
    """
    told = _TrackedReporter(reporter)
    for name in dict.fromkeys(config.runtime.track if ranks.is_first else ()):
        with _forgiving(name):
            told.trackers[name] = _TRACKERS[name](run, config, rows, reporter)
    try:
        yield told
    except BaseException:
        told.close(failed=True)
        raise
    told.close(failed=False)


class _TrackedReporter:
    """Passes the events of a run on, and its records to the trackers besides."""

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
        warnings.warn(f"{name} gets no more of this run, which goes on: {reason}", stacklevel=2)


def _metrics(row: Row) -> dict[str, float]:
    """The metrics of a record under the names that trackers group by: train/loss, val/loss, ..."""
    return {f"{row['split']}/{key}": value for key, value in row.items() if key not in ("split", "step")}  # type: ignore[misc]


class _TensorBoard:
    """Event files in RUN/tensorboard, written by a thread of their own.

    A run that goes on begins a new one with all its records, so that what is seen has no gaps and nothing twice.
    """

    def __init__(self, run: Path, config: RunConfig, rows: Sequence[Row], reporter: Reporter) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run / "tensorboard"
        # A TensorBoard that looks on is at the newest file: it goes on to the next, and there forgets all from step 0.
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
    """A run of Weights & Biases, kept in RUN/wandb and uploaded by a process of its own, unless WANDB_MODE=offline.

    A run that goes on keeps its name there. The server has the records up to where the earlier process ended and
    refuses them a second time; a process offline writes them all, so that its folder alone is the whole run.
    """

    def __init__(self, run: Path, config: RunConfig, rows: Sequence[Row], reporter: Reporter) -> None:
        import wandb  # takes a second

        settings = wandb.Settings(
            silent=True, console="off", init_timeout=_WANDB_INIT_S, finish_timeout=_WANDB_FINISH_S
        )
        mode = wandb.setup(settings).settings.mode
        if mode == "online" and not wandb.login(prompt=False, verify=False):  # `init` verifies
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
        elif self._run.url:  # with WANDB_MODE=disabled there is none
            reporter.note(f"wandb: {self._run.url}")

    def record(self, row: Row) -> None:
        if self._known:
            self._known -= 1
        else:
            self._run.log({"step": row["step"], **_metrics(row)})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _wandb_id(folder: Path) -> str:
    """What Weights & Biases knows the run by, the same for as long as its folder lives."""
    path = folder / "run-id"
    if not path.exists():
        folder.mkdir(exist_ok=True)
        write_atomically(path, secrets.token_hex(8).encode())
    return path.read_text(encoding="utf-8")


_TRACKERS: dict[str, Callable[[Path, RunConfig, Sequence[Row], Reporter], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
}
