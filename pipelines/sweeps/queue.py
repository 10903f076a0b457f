"""The runs of a sweep as processes, several at once; what fails does not keep the others from going on."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import tomli_w

from pipelines.config import ImageNetRunConfig
from pipelines.errors import RunInterrupted, UsageError
from pipelines.stopping import StopRequest, stop_on_signals
from pipelines.storage import write_atomically
from pipelines.sweeps.slots import Slot
from pipelines.sweeps.standing import Standing
from pipelines.training.metrics import Row
from pipelines.training.run_folder import RunFolder

_POLL_S = 0.2
_LOCK_WAIT_S = 60.0
_TAIL_BYTES = 4096
_STOPPED = (RunInterrupted.exit_code, -signal.SIGTERM)
"""Exit codes of a run that was asked to stop: saved, or before it had begun."""
_FOLDER = "sweep"
"""Beside the runs, whose names end with their seeds: their configurations and logs, and the lock."""


@dataclass(frozen=True)
class Failure:
    """A run that did not finish."""

    name: str
    reason: str
    log: Path


class QueueReporter(Protocol):
    """Receives what happens to the runs."""

    def waiting(self) -> None:
        """The runs of an earlier sweep have not ended yet."""

    def started(self, run: Standing, slot: int) -> None:
        """A run's process was started."""

    def progressed(self, run: Standing, slot: int, row: Row) -> None:
        """The newest training record of a run."""

    def ended(self, run: Standing, slot: int, how: str) -> None:
        """A run's process has ended: `done`, `stopped`, or with the reason of a failure."""


@dataclass
class _Process:
    run: Standing
    slot: int
    child: subprocess.Popen[bytes]
    log: Path
    log_start: int
    """Where this process's lines begin, after those of earlier ones."""


@dataclass(frozen=True)
class Program:
    """How a run's process is started: the command line before its arguments, and variables of its own."""

    command: Sequence[str]
    environment: Mapping[str, str]


def carry_out(
    runs: Sequence[Standing], out: Path, slots: Sequence[Slot], program: Program, reporter: QueueReporter
) -> list[Failure]:
    """Train the runs that are not done, one a slot, in their order; returns those that failed.

    `program` is `asgo`. A first signal is passed on; when all runs have ended, raises `RunInterrupted`. Raises
    `UsageError` where another sweep is at work in `out`.
    """
    waiting = [run for run in runs if run.state != "done"]
    if not waiting:
        return []
    folder = out / _FOLDER
    with _locked(folder, reporter) as lock, stop_on_signals() as stop:
        queue = _Queue(waiting, folder, slots, program, reporter, lock)
        queue.work(stop)
    return queue.failures


class _Queue:
    def __init__(
        self,
        waiting: list[Standing],
        folder: Path,
        slots: Sequence[Slot],
        program: Program,
        reporter: QueueReporter,
        lock: int,
    ) -> None:
        self.failures: list[Failure] = []
        self._waiting = waiting
        self._folder = folder
        self._slots = slots
        self._program = program
        self._reporter = reporter
        self._lock = lock
        self._busy: dict[int, _Process] = {}

    def work(self, stop: StopRequest) -> None:
        """Start and watch processes until there is nothing left to do, or all have ended after a signal."""
        passed_on = False
        try:
            while self._busy or (self._waiting and not stop):
                if not stop:
                    self._fill_slots()
                elif not passed_on:
                    passed_on = True
                    for process in self._busy.values():
                        process.child.terminate()
                time.sleep(_POLL_S)
                for process in list(self._busy.values()):
                    self._look_at(process, bool(stop))
        finally:  # a second Ctrl-C, or a disk that is full, leaves some
            for process in self._busy.values():
                process.child.kill()
                process.child.wait()
        if stop:
            told = f"{len(self.failures)} failed, the others are saved" if self.failures else "all runs are saved"
            raise RunInterrupted(f"{stop.signal_name}: {told}; the same command goes on")

    def _fill_slots(self) -> None:
        free = [slot for slot in range(len(self._slots)) if slot not in self._busy]
        for slot in free[: len(self._waiting)]:
            self._busy[slot] = self._start(self._waiting.pop(0), slot)

    def _start(self, run: Standing, slot: int) -> _Process:
        name = run.run.name
        config, log = self._folder / f"{name}.toml", self._folder / f"{name}.log"
        text = tomli_w.dumps(run.run.config.model_dump(mode="json", exclude_none=True))
        write_atomically(config, text.encode())
        arguments: list[object] = ["train", run.run.config.task, "--config", config, "--resume", "--out", run.folder]
        if isinstance(run.run.config, ImageNetRunConfig) and run.run.config.runtime.workers is None:
            arguments += ["--workers", self._slots[slot].threads]  # a run alone takes all cores
        with log.open("ab") as output:
            log_start = output.tell()  # before the child shares this position
            child = subprocess.Popen(
                [*self._program.command, *map(str, arguments)],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                env={**os.environ, **self._program.environment, **self._slots[slot].environment()},
                start_new_session=True,  # a Ctrl-C reaches the runs through this process alone, and once
                pass_fds=[self._lock],
            )  # fmt: skip
        self._reporter.started(run, slot)
        return _Process(run, slot, child, log, log_start)

    def _look_at(self, process: _Process, stopping: bool) -> None:
        code = process.child.poll()
        if code is None:
            row = newest_training_row(RunFolder(process.run.folder).metrics_path)
            if row is not None:
                self._reporter.progressed(process.run, process.slot, row)
            return
        del self._busy[process.slot]
        how = "done" if code == 0 else "stopped"
        if code != 0 and not (stopping and code in _STOPPED):
            failure = Failure(process.run.run.name, _reason(process, code), process.log)
            self.failures.append(failure)
            how = f"failed: {failure.reason}"
        self._reporter.ended(process.run, process.slot, how)


def newest_training_row(path: Path) -> Row | None:
    """The last whole training record of a metrics file that may be being written."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().split(b"\n")[1:-1]
    except OSError:
        return None
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            row: Row = json.loads(line)
            if row["split"] == "train":
                return row
    return None


def _reason(process: _Process, code: int) -> str:
    """Why a process failed, in one line: its first error, the signal that ended it, or else its last words."""
    with process.log.open("rb") as file:
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
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _try_lock(descriptor):
            reporter.waiting()
            deadline = time.monotonic() + _LOCK_WAIT_S
            while not _try_lock(descriptor):
                if time.monotonic() > deadline:
                    raise UsageError(
                        f"{folder.parent}: another sweep is at work here; wait for it, or choose another --out"
                    )
                time.sleep(_POLL_S)
        yield descriptor
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
