"""Execute the runs of a sweep in parallel processes. A failed run does not stop the others."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import tomli_w

from pipelines.errors import RunInterrupted, UsageError
from pipelines.locking import try_lock
from pipelines.stopping import StopRequest, stop_on_signals
from pipelines.storage import parse_json, refusing_links, write_atomically
from pipelines.sweeps.definition import SweepRun
from pipelines.sweeps.slots import Slot
from pipelines.sweeps.status import RunStatus
from pipelines.training.metrics import Row
from pipelines.training.run_folder import RunFolder

_POLL_S = 0.2
_LOCK_WAIT_S = 60.0
_STOPPED = (RunInterrupted.exit_code, -signal.SIGTERM)
"""Exit codes of a run that was asked to stop: after saving, or before training began."""
_Answer = TypeVar("_Answer")
FOLDER = "sweep"
"""Folder with configurations, logs and the lock. No run has this name: the names of runs end with a seed."""


@dataclass(frozen=True)
class Failure:
    """A run that did not finish."""

    name: str
    reason: str
    log: Path


@dataclass(frozen=True)
class Ending:
    """How a run's process ended."""

    kind: Literal["done", "stopped", "failed"]
    words: str
    """Description for messages; for a failure, the reason."""


class Source(Protocol):
    """Supplies the runs of a queue."""

    @property
    def waiting(self) -> str | None:
        """What later runs depend on, for a message, if `next` returns None; None if no more runs can come."""

    def next(self) -> RunStatus | None:
        """Return a run to start now; None if there is none."""

    def recorded(self, run: RunStatus, row: Row) -> bool:
        """Handle a validation row of a run; returns whether to stop the run early."""

    def ended(self, run: RunStatus, ending: Ending) -> Ending:
        """Handle the end of a run's process; returns the ending to report."""


class FixedRuns:
    """A list of runs, each started once."""

    waiting = None

    def __init__(self, runs: Sequence[RunStatus]) -> None:
        self._runs = list(runs)

    def next(self) -> RunStatus | None:
        """Return the next run of the list."""
        return self._runs.pop(0) if self._runs else None

    def recorded(self, run: RunStatus, row: Row) -> bool:
        """Never stop a run early."""
        return False

    def ended(self, run: RunStatus, ending: Ending) -> Ending:
        """Return the ending unchanged."""
        return ending


class QueueReporter(Protocol):
    """Receives the events of the runs."""

    def note(self, message: str) -> None:
        """A message for the user, such as what the queue waits for."""

    def started(self, run: RunStatus, slot: int) -> None:
        """A run's process started."""

    def progressed(self, run: RunStatus, slot: int, row: Row) -> None:
        """The newest training row of a run."""

    def ended(self, run: RunStatus, slot: int, how: str) -> None:
        """A run's process ended; `how` describes it."""


@dataclass
class _Process:
    run: RunStatus
    slot: int
    child: subprocess.Popen[bytes]
    log: Path
    log_start: int
    """Position of this process's first line; earlier processes wrote the lines before."""
    records: RecordsFollower
    given_up: bool = False


@dataclass(frozen=True)
class Program:
    """How to start a run's process: the command line before its arguments, and environment variables."""

    command: Sequence[str]
    environment: Mapping[str, str]


def queue_folder(out: Path, worker: int | None) -> Path:
    """Return the folder of a worker's configurations, logs and lock."""
    return out / FOLDER / f"worker-{worker}" if worker else out / FOLDER


def workers(out: Path) -> list[int]:
    """Return the numbers of the workers that have worked in `out`."""
    found = (path.name.removeprefix("worker-") for path in (out / FOLDER).glob("worker-*"))
    return [0, *sorted(int(number) for number in found if number.isdecimal())]


def carry_out(
    source: Source,
    out: Path,
    slots: Sequence[Slot],
    program: Program,
    reporter: QueueReporter,
    worker: int | None = None,
) -> list[Failure]:
    """Train the runs of `source` in `out`, one per slot; returns those that failed.

    Workers with different numbers may share `out`.

    `program` starts `asgo`. Forwards the first signal to the runs and raises `RunInterrupted` when all have ended.
    Raises `UsageError` if another sweep runs in `out`.
    """
    folder = queue_folder(out, worker)
    with _locked(folder, reporter) as lock, stop_on_signals() as stop:
        queue = _Queue(source, folder, slots, program, reporter, lock)
        queue.work(stop)
    return queue.failures


class _Queue:
    def __init__(
        self,
        source: Source,
        folder: Path,
        slots: Sequence[Slot],
        program: Program,
        reporter: QueueReporter,
        lock: int,
    ) -> None:
        self.failures: list[Failure] = []
        self._source = source
        self._folder = folder
        self._slots = slots
        self._program = program
        self._reporter = reporter
        self._lock = lock
        self._busy: dict[int, _Process] = {}
        self._noted: str | None = None
        self._source_error: Exception | None = None

    def work(self, stop: StopRequest) -> None:
        """Start and watch processes until no run is left, or, after a signal, until all have ended.

        If the source raised an error, for example of a full disk, raises it when all running processes have ended.
        """
        forwarded = False
        try:
            while True:
                if not stop:
                    self._fill_slots()
                elif not forwarded:
                    forwarded = True
                    for process in self._busy.values():
                        process.child.terminate()
                if not self._busy and (stop or not self._waits()):
                    break
                time.sleep(_POLL_S)
                for process in list(self._busy.values()):
                    self._look_at(process, bool(stop))
        finally:  # after a second Ctrl-C, some processes still run
            for process in self._busy.values():
                process.child.kill()
                process.child.wait()
        if stop:
            outcome = f"{len(self.failures)} failed, the others are saved" if self.failures else "all runs are saved"
            raise RunInterrupted(f"{stop.signal_name}: {outcome}; the same command resumes the sweep")
        if self._source_error is not None:
            raise self._source_error

    def _fill_slots(self) -> None:
        for slot in range(len(self._slots)):
            while slot not in self._busy and self._source_error is None:
                run = self._ask_source(self._source.next, None)
                if run is None:
                    return
                try:
                    self._busy[slot] = self._start(run, slot)
                except OSError as error:  # its configuration or log could not be written
                    self._end(run, slot, Ending("failed", _words(error)), self._log(run))

    def _ask_source(self, question: Callable[[], _Answer], default: _Answer) -> _Answer:
        """Call the source; on an error, return `default` and start no further runs. Running processes continue."""
        try:
            return question()
        except Exception as error:  # from the disk, or from a database driver
            if self._source_error is None:
                self._source_error = error
                self._reporter.note(f"{_words(error)}: no further run starts; running ones continue")
            return default

    def _waits(self) -> bool:
        """Whether to wait for more runs although none is running; notes each reason once."""
        waiting = None if self._source_error else self._source.waiting
        if waiting is not None and waiting != self._noted:
            self._reporter.note(waiting)
        self._noted = waiting
        return waiting is not None

    def _start(self, run: RunStatus, slot: int) -> _Process:
        config, log = write_config(run.run, self._folder), self._log(run)
        arguments: list[object] = ["train", run.run.config.task, "--config", config, "--resume", "--out", run.folder]
        if getattr(run.run.config.runtime, "workers", 0) is None:  # the default would use all cores
            arguments += ["--workers", self._slots[slot].threads]
        with open(log, "ab", opener=refusing_links) as output:
            log_start = output.tell()  # before the child, which shares this position, writes
            child = subprocess.Popen(
                [*self._program.command, *map(str, arguments)],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                env={**os.environ, **self._program.environment, **self._slots[slot].environment()},
                start_new_session=True,  # the terminal's Ctrl-C must reach the runs only once, through this process
                pass_fds=[self._lock],
            )  # fmt: skip
        self._reporter.started(run, slot)
        return _Process(run, slot, child, log, log_start, RecordsFollower(RunFolder(run.folder).metrics_path))

    def _look_at(self, process: _Process, stopping: bool) -> None:
        code = process.child.poll()
        if code is None:
            self._read_records(process)
            return
        del self._busy[process.slot]
        self._end(process.run, process.slot, _ending(process, code, stopping), process.log)

    def _end(self, run: RunStatus, slot: int, how: Ending, log: Path) -> None:
        ending = self._ask_source(lambda: self._source.ended(run, how), how)
        if ending.kind == "failed":
            self.failures.append(Failure(run.run.name, ending.words, log))
        words = f"failed: {ending.words}" if ending.kind == "failed" else ending.words
        self._reporter.ended(run, slot, words)

    def _log(self, run: RunStatus) -> Path:
        return self._folder / f"{run.run.name}.log"

    def _read_records(self, process: _Process) -> None:
        newest = None
        for row in process.records.new_rows():
            if row["split"] == "train":
                newest = row
            elif not process.given_up and self._gives_up(process.run, row):
                process.given_up = True
                process.child.terminate()
        if newest is not None:
            self._reporter.progressed(process.run, process.slot, newest)

    def _gives_up(self, run: RunStatus, row: Row) -> bool:
        return self._ask_source(lambda: self._source.recorded(run, row), False)


class RecordsFollower:
    """Reads new rows of a metrics file that a run writes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = -1
        self._position = 0

    def new_rows(self) -> list[Row]:
        """Return the complete rows since the last call; all rows if the file was replaced, as by a resumed run."""
        try:
            with self._path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self._inode:
                    self._inode, self._position = inode, 0
                file.seek(self._position)
                whole, newline, _torn = file.read().rpartition(b"\n")
        except OSError:
            return []
        self._position += len(whole) + len(newline)
        return [parse_json(line) for line in whole.split(b"\n")] if newline else []


def _ending(process: _Process, code: int, stopping: bool) -> Ending:
    if code == 0:
        return Ending("done", "done")
    if code in _STOPPED and (stopping or process.given_up):
        return Ending("stopped", "stopped")
    return Ending("failed", _reason(process, code))


def _words(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _reason(process: _Process, code: int) -> str:
    """Return why a process failed, in one line: its first error, the signal that ended it, or its last line."""
    lines = []
    with contextlib.suppress(OSError), process.log.open("rb") as file:
        file.seek(process.log_start)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if errors:
        return errors[0]
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return lines[-1] if lines else f"exit code {code}"


def write_config(run: SweepRun, folder: Path) -> Path:
    """Write the configuration of a run to `folder`; return the file."""
    path = folder / f"{run.name}.toml"
    write_atomically(path, tomli_w.dumps(run.config.model_dump(mode="json", exclude_none=True)).encode())
    return path


@contextlib.contextmanager
def _locked(folder: Path, reporter: QueueReporter) -> Iterator[int]:
    """Context manager that holds the sweep's lock. The runs inherit it, so it is free only after all have ended.

    The runs of a killed sweep save and end within seconds; waits for them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        if not try_lock(descriptor):
            reporter.note("waiting for the runs of another sweep in this folder to save and end")
            deadline = time.monotonic() + _LOCK_WAIT_S
            while not try_lock(descriptor):
                if time.monotonic() > deadline:
                    raise UsageError(f"{folder.parent}: another sweep runs here; wait for it, or choose another --out")
                time.sleep(_POLL_S)
        yield descriptor
    finally:
        os.close(descriptor)
