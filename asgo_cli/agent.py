"""Torchrun's agent in this process: starts and monitors the workers, and reports how they ended in one line."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch.distributed.run as torchrun
from torch.distributed import DistError, HashStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.events.api import Event, EventSource
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
    rendezvous_handler_registry,
)
from torch.distributed.launcher.api import LaunchConfig

from asgo_cli import console
from asgo_cli.live import clear_left_over
from asgo_cli.worker import LAUNCHER, OUTCOMES, RESTARTED, Kind, Outcome, read_outcomes
from pipelines.errors import AsgoError, RunInterrupted
from pipelines.stopping import stop_signals

Value = TypeVar("Value")

_GRACE_S = 30
"""Torch kills workers that still run this many seconds after a signal."""
_STORE_TIMEOUT_S = 60
_ANSWER_S = 60
_SHUTDOWN_S = 10
_LOOPBACK = "127.0.0.1"
_NO_ANSWER = "no connection to machine 0; is it running, and is the port open?"
_NO_SHARED_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


class WorkersEnded(Exception):
    """The workers ended, and no restart follows: it would not help, or none is left."""

    def __init__(self, first: Outcome) -> None:
        super().__init__(first.message)
        self.first = first


def run_workers(arguments: Sequence[str]) -> int:
    """Do what `torchrun ARGUMENTS` does, without its tables and tracebacks; return the exit code.

    Raises `AsgoError` if the machines of the run cannot connect, or lose the connection.
    """
    if os.environ.get("ASGO_DEBUG") != "1":
        logger = logging.getLogger("torch.distributed.elastic")
        logger.propagate = False
        logger.addHandler(logging.NullHandler())
    options = torchrun.parse_args(list(arguments))  # type: ignore[no-untyped-call]
    # Without an endpoint, torch warns about options that were not given.
    options.rdzv_endpoint = options.rdzv_endpoint or _LOOPBACK
    with _scratch_folder() as folder, _signals_handled() as signals:
        options.log_dir = str(folder / "logs")
        config, command, command_arguments = torchrun.config_from_args(options)
        outcomes = folder / "outcomes"
        outcomes.mkdir()
        os.environ.update({OUTCOMES: str(outcomes), LAUNCHER: str(os.getpid())})
        try:
            return _run(config, str(command), command_arguments, outcomes, signals)
        except (RendezvousError, DistError) as error:
            clear_left_over()
            raise AsgoError(_rendezvous_message(config, error)) from error


def _run(config: LaunchConfig, command: str, arguments: Sequence[str], folder: Path, signals: _Signals) -> int:
    agent = None
    try:
        with signals.raised():
            agent = _agent(config, command, arguments, folder, signals)
            agent.run()
        return 0
    except WorkersEnded as ended:
        clear_left_over()
        return _report(ended.first)
    except SignalException as caught:
        clear_left_over()
        return _report_after_signal(agent, caught.sigval)
    finally:
        if agent is not None:
            agent.leave()


def _agent(config: LaunchConfig, command: str, arguments: Sequence[str], folder: Path, signals: _Signals) -> _Agent:
    spec = WorkerSpec(
        role=config.role,
        local_world_size=config.nproc_per_node,
        entrypoint=command,
        args=tuple(arguments),
        rdzv_handler=_rendezvous_handler(config),
        max_restarts=config.max_restarts,
        monitor_interval=config.monitor_interval,
        local_addr=config.local_addr,
        numa_options=config.numa_options,
    )
    assert config.logs_specs is not None
    return _Agent(spec, config.logs_specs, folder, config.rdzv_endpoint, signals)


def _rendezvous_handler(config: LaunchConfig) -> RendezvousHandler:
    """Return the rendezvous of the agents of all machines."""
    if config.max_nodes == 1:
        return _InMemoryRendezvous(config.run_id)
    parameters = RendezvousParameters(
        config.rdzv_backend,
        config.rdzv_endpoint,
        config.run_id,
        config.min_nodes,
        config.max_nodes,
        config.local_addr,
        **config.rdzv_configs,
    )
    return _call_in_thread(lambda: rendezvous_handler_registry.create_handler(parameters))


def _call_in_thread(call: Callable[[], Value]) -> Value:
    """Return `call()`, made in a thread: in the main thread, Python would run no signal handler while it blocks."""
    result: Future[Value] = Future()

    def work() -> None:
        try:
            result.set_result(call())
        except Exception as error:
            result.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return result.result()


class _InMemoryRendezvous(RendezvousHandler):
    """The rendezvous of a run on one machine.

    Torch's own, also with --standalone, listens on all interfaces and unpickles what it receives. This one opens no
    socket.
    """

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id

    @property
    def use_agent_store(self) -> bool:
        return True  # the workers join the agent's store and do not open one

    def get_backend(self) -> str:
        return "memory"

    def next_rendezvous(self) -> RendezvousInfo:
        return RendezvousInfo(HashStore(), 0, 1, RendezvousStoreInfo(_LOOPBACK, 0))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Do nothing: there is no other agent."""

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True


class _Agent(LocalElasticAgent):
    """Torch's agent of one machine. Overrides only methods that torch intends for it."""

    def __init__(self, spec: WorkerSpec, logs_specs: Any, folder: Path, endpoint: str, signals: _Signals) -> None:
        super().__init__(spec, logs_specs)
        self.has_workers = False
        self._folder = folder
        self._endpoint = endpoint
        self._signals = signals
        self._failed_attempts = 0
        self._workers_store: TCPStore | None = None
        self._asking_since: float | None = None
        # Machines that join later learn only of stores that are created anew for every rendezvous.
        os.environ[_NO_SHARED_STORE] = "1"
        threading.Thread(target=self._end_when_cut_off, daemon=True).start()

    def leave(self) -> None:
        """Tell the other machines that this one leaves; give up after some seconds."""
        shutdown = threading.Thread(target=self._worker_group.spec.rdzv_handler.shutdown, daemon=True)
        shutdown.start()
        shutdown.join(_SHUTDOWN_S)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        for path in self._folder.iterdir():
            path.unlink()
        self._give_fresh_store(worker_group)
        os.environ[_NO_SHARED_STORE] = "0"  # otherwise the first worker opens a store too
        with self._signals.held_back():
            started: dict[int, Any] = super()._start_workers(worker_group)
            for local_rank, pid in started.items():
                worker_group.workers[local_rank].id = pid  # torch sets it later, perhaps after a signal that needs it
            self.has_workers = True
        os.environ[_NO_SHARED_STORE] = "1"
        os.environ[RESTARTED] = "1"  # for the workers of the next attempt
        return started

    def _give_fresh_store(self, group: WorkerGroup) -> None:
        """Give the workers a new store for this attempt.

        Torch uses one store for all attempts. If rank 0 was lost, the workers of the second attempt find the addresses
        of the first there, and wait forever.
        """
        assert group.store is not None
        if group.group_rank == 0:
            host = _LOOPBACK if group.group_world_size == 1 else group.spec.local_addr or str(group.master_addr)
            self._workers_store = _store_on_loopback() if host == _LOOPBACK else _store_on_all_interfaces(host)
            group.store.set("asgo", f"{self._workers_store.port} {host}")
        group.store.wait(["asgo"], timedelta(seconds=_STORE_TIMEOUT_S))
        port, group.master_addr = group.store.get("asgo").decode().split()
        group.master_port = int(port)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        began = time.time()
        self._asking_since = None
        result: RunResult = super()._monitor_workers(worker_group)
        if not result.is_failed():
            if result.state == WorkerState.HEALTHY:
                self._asking_since = time.monotonic()  # torch asks machine 0 next whether others wait to join
            return result
        first = first_of(self.outcomes(result, began))
        allowed = worker_group.spec.max_restarts
        self._failed_attempts += 1
        if first.kind in ("stopped", "refused") or self._failed_attempts > allowed:
            raise WorkersEnded(first)
        clear_left_over()
        console.warn(
            f"a worker was lost ({_sentence(first)}); "
            f"restart {self._failed_attempts} of {allowed} from the newest checkpoint"
        )
        return result

    def _construct_event(self, state: str, source: EventSource, *_arguments: Any, **_keywords: Any) -> Event:
        """Return an event without a host name: torch looks it up each time, 10 s where no name server answers."""
        return Event(f"torchelastic.worker.status.{state}", source)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        super()._stop_workers(worker_group)
        self.has_workers = False
        self._signals.release()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, *arguments: Any, **keywords: Any) -> None:
        """Signal the workers and wait for them. Signals during the wait are passed on and do not interrupt it."""

        def pass_on(number: int, _frame: FrameType | None) -> None:
            self._signals.wait(number)  # otherwise lost workers would be restarted
            self._signal_workers(number)

        self._asking_since = None
        with _signal_handlers_restored():
            for number in stop_signals():
                signal.signal(number, pass_on)
            # A closed terminal (SIGHUP) makes the workers save, too.
            sent = signal.SIGINT if death_sig == signal.SIGINT else signal.SIGTERM
            super()._shutdown(sent, *arguments, **keywords)

    def _end_when_cut_off(self) -> None:
        """End this process if machine 0 does not answer. Torch itself waits many minutes when the network is down."""
        seconds, before = 0, None
        while seconds < _ANSWER_S:  # counted, not measured: this process may be suspended in between
            time.sleep(1)
            seconds = seconds + 1 if self._asking_since is not None and self._asking_since == before else 0
            before = self._asking_since
        self._signal_workers(signal.SIGTERM)
        console.fail(f"{self._endpoint}: {_NO_ANSWER}")
        time.sleep(_SHUTDOWN_S)
        self._signal_workers(signal.SIGKILL)
        os._exit(1)

    def _signal_workers(self, number: int) -> None:
        for worker in self._worker_group.workers:
            with contextlib.suppress(ProcessLookupError, TypeError):
                os.killpg(worker.id, number)

    def outcomes(self, result: RunResult, began: float) -> list[Outcome]:
        """Return the outcomes of this machine's unfinished workers, made from the exit code if a worker left none."""
        reported = {outcome.rank: outcome for outcome in read_outcomes(self._folder)}
        size = self._worker_group.workers[0].world_size
        silent = [
            _silent_outcome(failure, rank, size, began)
            for rank, failure in result.failures.items()
            if rank not in reported
        ]
        return [*reported.values(), *silent]

    def result_after_signal(self) -> RunResult:
        """Return the exit codes, once all workers have ended."""
        result: RunResult = super()._monitor_workers(self._worker_group)
        return result


def _store_on_all_interfaces(host: str) -> TCPStore:
    return TCPStore(host, 0, is_master=True, wait_for_workers=False)


def _store_on_loopback() -> TCPStore:
    """Return a store that only this machine can reach: a `TCPStore` that opens its own socket listens everywhere."""
    with socket.create_server((_LOOPBACK, 0)) as listening:
        port = listening.getsockname()[1]
        return TCPStore(_LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())


def first_of(outcomes: Sequence[Outcome]) -> Outcome:
    """Return the outcome that explains the others: the earliest one that is not a consequence, if there is any."""
    return min(outcomes, key=lambda outcome: (outcome.kind == "consequence", outcome.time))


def _silent_outcome(failure: ProcessFailure, rank: int, size: int, began: float) -> Outcome:
    code = failure.exitcode
    number = -code if code < 0 else code - 128  # the shell's convention, in which a second Ctrl-C is 130
    # When one worker fails, the agent sends SIGTERM to the others, and kills them later.
    by_agent = number in (signal.SIGTERM, signal.SIGINT) or failure.timestamp > began + _GRACE_S / 2
    if number > 0:
        memory = ", perhaps out of memory" if number == signal.SIGKILL else ""
        message = f"was killed by {_signal_name(number)}{memory}"
    else:
        message = f"ended with exit code {code} without an error message"
    kind: Kind = "consequence" if by_agent else "crashed"
    return Outcome(kind, 1, message, rank, size, socket.gethostname(), failure.timestamp)


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def _sentence(outcome: Outcome) -> str:
    if outcome.kind == "hung":  # the message names the slowest ranks, which are mostly others
        return outcome.message
    separator = " " if outcome.message.startswith(("was killed", "ended with")) else ": "
    return f"{outcome.place}{separator}{outcome.message}"


def _report(first: Outcome) -> int:
    if first.kind == "stopped":
        console.say(f"stopped: {first.message}")
    else:
        # Exit code 2: wrong usage or configuration, which is the same on every rank.
        console.fail(first.message if first.exit_code == 2 else _sentence(first))
    return first.exit_code


def _report_after_signal(agent: _Agent | None, number: signal.Signals) -> int:
    if (agent is None or not agent.has_workers) and RESTARTED not in os.environ:
        console.say(f"stopped: {number.name} before the processes were started")
        return 128 + number
    if agent is None or not agent.has_workers:
        console.say(f"stopped: {number.name} while the processes restart; to resume, add --resume")
        return RunInterrupted.exit_code
    result = agent.result_after_signal()
    outcomes = agent.outcomes(result, began=0.0)
    if not outcomes:
        return 0
    first = first_of(outcomes)
    if first.kind == "consequence":  # killed by the signal before it could save
        console.fail(f"{number.name}: {_sentence(first)}; what was not in a checkpoint is lost")
        return 128 + number
    return _report(first)


def _rendezvous_message(config: LaunchConfig, error: Exception) -> str:
    place = config.rdzv_endpoint
    if isinstance(error, RendezvousClosedError):
        return f"{place}: the run has ended on another machine; see the error there"
    if isinstance(error, RendezvousTimeoutError):
        return f"{place}: not all of the {config.min_nodes} machines joined in time; start the same command on each"
    if isinstance(error, RendezvousConnectionError) and config.rdzv_configs.get("is_host") in (1, "1"):
        return f"{place}: cannot listen there; is the port in use, or is this another machine's address?"
    return f"{place}: {_NO_ANSWER}"


class _Signals:
    """The launcher's signal handler.

    Torch's own raises at once, even before the process ids of new workers are recorded: they would run on.
    """

    def __init__(self) -> None:
        self._held_back = True
        self._pending: signal.Signals | None = None

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        if not self._held_back:
            raise SignalException(f"got signal {number}", signal.Signals(number))
        self.wait(number)

    def wait(self, number: int) -> None:
        """Make the signal raise `SignalException` at the next `release`."""
        self._pending = self._pending or signal.Signals(number)

    def release(self) -> None:
        """Raise for a pending signal, and from now on for new ones at once."""
        self._held_back = False
        if self._pending is not None:
            self(self._pending, None)

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        """Context manager in which signals, pending ones too, raise `SignalException`; afterwards they only pend."""
        try:
            self.release()
            yield
        finally:
            self._held_back = True

    @contextlib.contextmanager
    def held_back(self) -> Iterator[None]:
        """Context manager that defers signals to its end. Processes started in it block SIGINT until `begin_worker`."""
        self._held_back = True
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            self.release()


@contextlib.contextmanager
def _signals_handled() -> Iterator[_Signals]:
    signals = _Signals()
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # the others are handled here
    with _signal_handlers_restored():
        for number in stop_signals():
            signal.signal(number, signals)
        yield signals


@contextlib.contextmanager
def _scratch_folder() -> Iterator[Path]:
    """Yield a private temporary folder for logs and outcomes of the workers."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="asgo-")
    except OSError as error:
        raise AsgoError(f"no temporary folder is writable ({error.strerror}); set TMPDIR to a writable one") from error
    with folder as name:
        yield Path(name)


@contextlib.contextmanager
def _signal_handlers_restored() -> Iterator[None]:
    """Restore the signal handlers at the end: torch does not restore those that it replaces."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
