"""Starts and monitors the processes of a run on this machine, and reports how they ended in one line."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

from asgo_cli import console
from asgo_cli.launch import Launch, own_path, threads_per_process, worker_arguments
from asgo_cli.live import clear_left_over
from asgo_cli.machines import GRACE_S, TICK_S, CutOff, Machines, Stopped, first_of
from asgo_cli.worker import LAUNCHER, OUTCOMES, Kind, Outcome, read_outcomes
from pipelines.errors import AsgoError, RunInterrupted
from pipelines.stopping import handling_stop_signals

_TICKS_A_POLL = 10


def start(launch: Launch, arguments: Sequence[str]) -> int:
    """Start the processes of `asgo ARGUMENTS`, wait for them, and report how they ended; return the exit code."""
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_process(launch)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.update(own_path())
    return supervise(launch, [sys.executable, "-m", "asgo_cli", *worker_arguments(launch, arguments)])


def supervise(launch: Launch, command: Sequence[str]) -> int:
    """Run the command once per process of this machine until the run ends; return the exit code.

    Raises `AsgoError` if the machines of the run cannot connect, or lose the connection.
    """
    with _scratch_folder() as folder, _recorded_signals() as signals:
        supervisor = _Supervisor(launch, command, folder, signals)
        try:
            return supervisor.run()
        except Stopped as stopped:
            return _report(supervisor.stopped(0, stopped.number))


class _Supervisor:
    def __init__(self, launch: Launch, command: Sequence[str], folder: Path, signals: list[signal.Signals]) -> None:
        self._launch = launch
        self._command = command
        self._folder = folder
        self._signals = signals
        self._seen_signals = 0
        self._workers: _Workers | None = None

    def run(self) -> int:
        """Start the processes, and restart them after a loss, until the run ends; return the exit code."""
        machines = Machines(self._launch, self._pass_on_signals)
        attempt = machines.enter()
        while True:
            outcome = self._attempt(machines, attempt)
            clear_left_over()
            restarts = False
            try:
                restarts, outcome = machines.conclude(attempt, outcome)
            except (Stopped, CutOff) as error:  # this machine reports what it knows
                if isinstance(error, CutOff) and outcome is not None and outcome.kind == "consequence":
                    raise
            if outcome is None:
                return 0
            if not restarts:
                return _report(outcome)
            attempt += 1
            restart = f"restart {attempt} of {self._launch.max_restarts} from the newest checkpoint"
            console.warn(f"a worker was lost ({outcome.sentence}); {restart}")

    def stopped(self, attempt: int, number: signal.Signals) -> Outcome:
        """Return the outcome of a launcher that a signal ends while it has no processes."""
        if attempt == 0:
            return self._outcome("stopped", f"{number.name} before the processes were started", 128 + number)
        message = f"{number.name} while the processes restart; to resume, add --resume"
        return self._outcome("stopped", message, RunInterrupted.exit_code)

    def _attempt(self, machines: Machines, attempt: int) -> Outcome | None:
        """Start the processes and wait until all have ended; return the reason, or None if they finished."""
        try:
            if self._signals:
                raise Stopped(self._signals[0])
            if machines.sizes(attempt):  # it runs, but the launcher that this one replaces was lost
                return self._outcome("crashed", "its launcher was lost, and started again")
            sizes = machines.join(attempt)
            if not sizes:
                return self._outcome("consequence", "the run has ended on another machine")
            return self._work(machines, attempt, sizes)
        except Stopped as stopped:
            return self.stopped(attempt, stopped.number)
        except TimeoutError:
            missing = f"not all of the {self._launch.nodes} machines joined in time; start the same command on each"
            return self._outcome("ended", f"{self._launch.rendezvous}: {missing}")

    def _work(self, machines: Machines, attempt: int, sizes: Sequence[int]) -> Outcome | None:
        """Run the processes. One that fails, here or on another machine, ends all: SIGTERM, later SIGKILL."""
        for path in self._folder.iterdir():
            path.unlink()
        workers = self._workers = _Workers(self._command, self._environments(machines, attempt, sizes))
        machines.open_store()
        ticks = ticks_ending = 0
        while workers.are_running():
            time.sleep(TICK_S)
            self._pass_on_signals()
            ticks += 1
            is_lost = workers.have_failed or (ticks % _TICKS_A_POLL == 0 and machines.is_ending(attempt))
            if is_lost and not self._signals and ticks_ending == 0:
                workers.send(signal.SIGTERM)
            if is_lost or self._signals or ticks_ending:
                ticks_ending += 1
            if ticks_ending * TICK_S >= GRACE_S:
                workers.send(signal.SIGKILL)
        self._workers = None
        first = first_of(workers.outcomes(self._folder, sum(sizes)))
        return first and self._after_signals(first)

    def _after_signals(self, first: Outcome) -> Outcome:
        """Return the outcome such that nothing is restarted if this launcher received a signal."""
        if not self._signals or first.kind == "stopped":
            return first
        if first.kind != "consequence":
            return replace(first, kind="ended", message=first.sentence)
        number = self._signals[0]  # it killed the process before that could save
        message = f"{number.name}: {first.sentence}; what was not in a checkpoint is lost"
        return replace(first, kind="ended", exit_code=128 + number, message=message)

    def _environments(self, machines: Machines, attempt: int, sizes: Sequence[int]) -> list[dict[str, str]]:
        """Return the environment of each process, with torchrun's variables."""
        node = self._launch.node_rank or 0
        shared = {
            "WORLD_SIZE": sum(sizes), "LOCAL_WORLD_SIZE": sizes[node],
            "MASTER_ADDR": machines.host, "MASTER_PORT": machines.port,
            "TORCHELASTIC_RUN_ID": "asgo", "TORCHELASTIC_RESTART_COUNT": attempt, "TORCHELASTIC_USE_AGENT_STORE": True,
            OUTCOMES: self._folder, LAUNCHER: os.getpid(),
        }  # fmt: skip
        ranks = [{"RANK": sum(sizes[:node]) + index, "LOCAL_RANK": index} for index in range(sizes[node])]
        return [{**os.environ, **{name: str(value) for name, value in {**shared, **own}.items()}} for own in ranks]

    def _pass_on_signals(self) -> None:
        """Send new signals to the processes. Raises `Stopped` if there are none."""
        new = self._signals[self._seen_signals :]
        self._seen_signals += len(new)
        for number in new:
            if self._workers is None:
                raise Stopped(number)
            # A closed terminal (SIGHUP) makes the processes save, too.
            self._workers.send(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    def _outcome(self, kind: Kind, message: str, exit_code: int = 1) -> Outcome:
        rank = (self._launch.node_rank or 0) * self._launch.local_size
        return Outcome(kind, exit_code, message, rank, self._launch.size)


class _Workers:
    """The processes of this machine in one attempt."""

    def __init__(self, command: Sequence[str], environments: Sequence[dict[str, str]]) -> None:
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._ended_at: dict[int, float] = {}
        self._killed_at = math.inf
        # A process inherits this, until `begin_worker`: it would answer Ctrl-C with a traceback while it starts.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for environment in environments:
                process = subprocess.Popen(command, env=environment, start_new_session=True)
                self._processes[int(environment["RANK"])] = process
        except OSError:  # no memory, or too many processes
            self.send(signal.SIGKILL)
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def are_running(self) -> bool:
        """Return whether at least one process runs."""
        for rank, process in self._processes.items():
            if process.poll() is not None:
                self._ended_at.setdefault(rank, time.time())
        return len(self._ended_at) < len(self._processes)

    @property
    def have_failed(self) -> bool:
        """Whether a process has ended before it finished."""
        return any(process.returncode for process in self._processes.values())

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the processes that run, and to their children."""
        if number == signal.SIGKILL:
            self._killed_at = min(self._killed_at, time.time())
        for process in self._processes.values():
            if process.poll() is None:
                os.killpg(process.pid, number)

    def outcomes(self, folder: Path, size: int) -> list[Outcome]:
        """Return the outcomes of unfinished processes, made from the exit code if a process wrote none."""
        written = {outcome.rank: outcome for outcome in read_outcomes(folder)}
        silent = [rank for rank, process in self._processes.items() if process.returncode and rank not in written]
        return [*written.values(), *(self._silent_outcome(rank, size) for rank in silent)]

    def _silent_outcome(self, rank: int, size: int) -> Outcome:
        code = self._processes[rank].returncode
        number = -code if code < 0 else code - 128  # the shell's convention, in which a second Ctrl-C is 130
        killed_by_launcher = number == signal.SIGKILL and self._ended_at[rank] > self._killed_at
        by_launcher = number in (signal.SIGTERM, signal.SIGINT) or killed_by_launcher
        if number > 0:
            memory = ", perhaps out of memory" if number == signal.SIGKILL else ""
            message = f"was killed by {_signal_name(number)}{memory}"
        else:
            message = f"ended with exit code {code} without an error message"
        return Outcome("consequence" if by_launcher else "crashed", 1, message, rank, size, time=self._ended_at[rank])


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def _report(outcome: Outcome) -> int:
    if outcome.kind == "stopped":
        console.say(f"stopped: {outcome.message}")
    else:
        console.fail(outcome.sentence)
    return outcome.exit_code


@contextlib.contextmanager
def _recorded_signals() -> Iterator[list[signal.Signals]]:
    """Yield a list that every signal is added to. A handler that raises could interrupt the start of a process."""
    received: list[signal.Signals] = []

    def record(number: int, _frame: FrameType | None) -> None:
        received.append(signal.Signals(number))

    with handling_stop_signals(record):
        yield received


@contextlib.contextmanager
def _scratch_folder() -> Iterator[Path]:
    """Yield a private temporary folder for the outcomes of the processes."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="asgo-")
    except OSError as error:
        raise AsgoError(f"no temporary folder is writable ({error.strerror}); set TMPDIR to a writable one") from error
    with folder as name:
        yield Path(name)
