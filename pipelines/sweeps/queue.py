"""The runs of a sweep as processes, several at once; what fails does not keep the others from going on."""

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
from pipelines.sweeps.slots import Slot
from pipelines.sweeps.status import RunStatus
from pipelines.training.metrics import Row
from pipelines.training.run_folder import RunFolder

_POLL_S = 0.2
_LOCK_WAIT_S = 60.0
_STOPPED = (RunInterrupted.exit_code, -signal.SIGTERM)
"""Exit codes of a run that was asked to stop: saved, or before it had begun."""
_Answer = TypeVar("_Answer")
FOLDER = "sweep"
"""Beside the runs, whose names end with their seeds: their configurations and logs, and the lock."""


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
    """For people; of a failure, the reason."""


class Source(Protocol):
    """Where the runs come from."""

    @property
    def waiting(self) -> str | None:
        """What more runs depend on, in words, when `next` has none; None if nothing can bring more."""

    def next(self) -> RunStatus | None:
        """A run to start now, if there is one."""

    def recorded(self, run: RunStatus, row: Row) -> bool:
        """A validation was recorded; returns whether the run is to be given up."""

    def ended(self, run: RunStatus, ending: Ending) -> Ending:
        """A run's process has ended; returns what that means here."""


class FixedRuns:
    """A list of runs, each started once."""

    waiting = None

    def __init__(self, runs: Sequence[RunStatus]) -> None:
        self._runs = list(runs)

    def next(self) -> RunStatus | None:
        """In their order."""
        return self._runs.pop(0) if self._runs else None

    def recorded(self, run: RunStatus, row: Row) -> bool:
        """None is given up."""
        return False

    def ended(self, run: RunStatus, ending: Ending) -> Ending:
        """It means what it says."""
        return ending


class QueueReporter(Protocol):
    """Receives what happens to the runs."""

    def note(self, message: str) -> None:
        """Why nothing happens yet, or any more."""

    def started(self, run: RunStatus, slot: int) -> None:
        """A run's process was started."""

    def progressed(self, run: RunStatus, slot: int, row: Row) -> None:
        """The newest training record of a run."""

    def ended(self, run: RunStatus, slot: int, how: str) -> None:
        """A run's process has ended, in words."""


@dataclass
class _Process:
    run: RunStatus
    slot: int
    child: subprocess.Popen[bytes]
    log: Path
    log_start: int
    """Where this process's lines begin, after those of earlier ones."""
    records: RecordsFollower
    given_up: bool = False


@dataclass(frozen=True)
class Program:
    """How a run's process is started: the command line before its arguments, and variables of its own."""

    command: Sequence[str]
    environment: Mapping[str, str]


def carry_out(
    source: Source, out: Path, slots: Sequence[Slot], program: Program, reporter: QueueReporter
) -> list[Failure]:
    """Train the source's runs in `out`, one a slot; returns those that failed.

    `program` is `asgo`. A first signal is passed on; when all runs have ended, raises `RunInterrupted`. Raises
    `UsageError` where another sweep is at work in `out`.
    """
    folder = out / FOLDER
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
        self._told: str | None = None
        self._source_error: Exception | None = None

    def work(self, stop: StopRequest) -> None:
        """Start and watch processes until there is nothing left to do, or all have ended after a signal.

        Raises what the source has raised, as of a full disk, when the runs at work have ended.
        """
        passed_on = False
        try:
            while True:
                if not stop:
                    self._fill_slots()
                elif not passed_on:
                    passed_on = True
                    for process in self._busy.values():
                        process.child.terminate()
                if not self._busy and (stop or not self._waits()):
                    break
                time.sleep(_POLL_S)
                for process in list(self._busy.values()):
                    self._look_at(process, bool(stop))
        finally:  # a second Ctrl-C leaves some
            for process in self._busy.values():
                process.child.kill()
                process.child.wait()
        if stop:
            told = f"{len(self.failures)} failed, the others are saved" if self.failures else "all runs are saved"
            raise RunInterrupted(f"{stop.signal_name}: {told}; the same command goes on")
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
                except OSError as error:  # of its configuration or its log; the others may do better
                    self._end(run, slot, Ending("failed", _words(error)), self._log(run))

    def _ask_source(self, question: Callable[[], _Answer], default: _Answer) -> _Answer:
        """The answer, or `default` where the source fails: then no run begins any more, and those at work go on."""
        try:
            return question()
        except Exception as error:  # of the disk, or of any database's driver
            if self._source_error is None:
                self._source_error = error
                self._reporter.note(f"{_words(error)}: no further run begins; those at work go on")
            return default

    def _waits(self) -> bool:
        """Whether more runs may come although none is at work; says what for, once."""
        waiting = None if self._source_error else self._source.waiting
        if waiting is not None and waiting != self._told:
            self._reporter.note(waiting)
        self._told = waiting
        return waiting is not None

    def _start(self, run: RunStatus, slot: int) -> _Process:
        name = run.run.name
        config, log = self._folder / f"{name}.toml", self._log(run)
        text = tomli_w.dumps(run.run.config.model_dump(mode="json", exclude_none=True))
        write_atomically(config, text.encode())
        arguments: list[object] = ["train", run.run.config.task, "--config", config, "--resume", "--out", run.folder]
        if getattr(run.run.config.runtime, "workers", 0) is None:  # a run alone takes all cores
            arguments += ["--workers", self._slots[slot].threads]
        with open(log, "ab", opener=refusing_links) as output:
            log_start = output.tell()  # before the child shares this position
            child = subprocess.Popen(
                [*self._program.command, *map(str, arguments)],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                env={**os.environ, **self._program.environment, **self._slots[slot].environment()},
                start_new_session=True,  # a Ctrl-C reaches the runs through this process alone, and once
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
    """Reads a metrics file while it is written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = -1
        self._position = 0

    def new_rows(self) -> list[Row]:
        """The whole records since the last call; all of them again where the file was replaced, as by a resumed run."""
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
    """Why a process failed, in one line: its first error, the signal that ended it, or else its last words."""
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


@contextlib.contextmanager
def _locked(folder: Path, reporter: QueueReporter) -> Iterator[int]:
    """Hold the sweep's lock; the runs inherit it, so that it is free only when all of them have ended, too.

    Those of a sweep that was killed save and end within seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        if not try_lock(descriptor):
            reporter.note("waiting for the runs of another sweep in this folder to save and end")
            deadline = time.monotonic() + _LOCK_WAIT_S
            while not try_lock(descriptor):
                if time.monotonic() > deadline:
                    raise UsageError(
                        f"{folder.parent}: another sweep is at work here; wait for it, or choose another --out"
                    )
                time.sleep(_POLL_S)
        yield descriptor
    finally:
        os.close(descriptor)
