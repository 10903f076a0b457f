"""Torchrun's agent in this process: it starts the workers, watches them, and tells how they ended in our words."""

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
"""Torch kills workers that have not ended so long after a signal."""
_STORE_TIMEOUT_S = 60
_ANSWER_S = 60
_FAREWELL_S = 10
_LOOPBACK = "127.0.0.1"
_NO_ANSWER = "no connection to machine 0; is it running, and the port open?"
_NO_SHARED_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


class WorkersEnded(Exception):
    """The workers ended for a reason that a restart would not mend, or the last restart is used up."""

    def __init__(self, first: Outcome) -> None:
        super().__init__(first.message)
        self.first = first


def run_workers(arguments: Sequence[str]) -> int:
    """Do what `torchrun ARGUMENTS` does, without its tables and tracebacks; returns the exit code.

    Raises `AsgoError` when the machines of the run do not find, or lose, each other.
    """
    if os.environ.get("ASGO_DEBUG") != "1":
        logger = logging.getLogger("torch.distributed.elastic")
        logger.propagate = False
        logger.addHandler(logging.NullHandler())
    options = torchrun.parse_args(list(arguments))  # type: ignore[no-untyped-call]
    options.rdzv_endpoint = options.rdzv_endpoint or _LOOPBACK  # without one, torch warns of options not given
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
        return _tell(ended.first)
    except SignalException as caught:
        clear_left_over()
        return _tell_after_signal(agent, caught.sigval)
    finally:
        if agent is not None:
            agent.leave()


def _agent(config: LaunchConfig, command: str, arguments: Sequence[str], folder: Path, signals: _Signals) -> _Agent:
    spec = WorkerSpec(
        role=config.role,
        local_world_size=config.nproc_per_node,
        entrypoint=command,
        args=tuple(arguments),
        rdzv_handler=_meeting_place(config),
        max_restarts=config.max_restarts,
        monitor_interval=config.monitor_interval,
        local_addr=config.local_addr,
        numa_options=config.numa_options,
    )
    assert config.logs_specs is not None
    return _Agent(spec, config.logs_specs, folder, config.rdzv_endpoint, signals)


def _meeting_place(config: LaunchConfig) -> RendezvousHandler:
    """Where the agents of all machines meet."""
    if config.max_nodes == 1:
        return _Alone(config.run_id)
    parameters = RendezvousParameters(
        config.rdzv_backend,
        config.rdzv_endpoint,
        config.run_id,
        config.min_nodes,
        config.max_nodes,
        config.local_addr,
        **config.rdzv_configs,
    )
    return _answered(lambda: rendezvous_handler_registry.create_handler(parameters))


def _answered(ask: Callable[[], Value]) -> Value:
    """The result of a call that waits for another machine, during which Python could not heed a signal."""
    answer: Future[Value] = Future()

    def work() -> None:
        try:
            answer.set_result(ask())
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return answer.result()


class _Alone(RendezvousHandler):
    """The meeting place of an agent that has no others to meet.

    Torch's, with --standalone too, listens on all interfaces and unpickles what it is sent. This one is in memory.
    """

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id

    @property
    def use_agent_store(self) -> bool:
        return True  # the workers are to join the store of the agent, not to open one

    def get_backend(self) -> str:
        return "memory"

    def next_rendezvous(self) -> RendezvousInfo:
        return RendezvousInfo(HashStore(), 0, 1, RendezvousStoreInfo(_LOOPBACK, 0))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """There is nobody to tell."""

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True


class _Agent(LocalElasticAgent):
    """Torch's agent of one machine, through the methods that are made to be overridden."""

    def __init__(self, spec: WorkerSpec, logs_specs: Any, folder: Path, endpoint: str, signals: _Signals) -> None:
        super().__init__(spec, logs_specs)
        self.has_workers = False
        self._folder = folder
        self._endpoint = endpoint
        self._signals = signals
        self._failed_attempts = 0
        self._workers_store: TCPStore | None = None
        self._asking_since: float | None = None
        # Machines that come later are told only of a meeting place that is made anew every time.
        os.environ[_NO_SHARED_STORE] = "1"
        threading.Thread(target=self._end_when_cut_off, daemon=True).start()

    def leave(self) -> None:
        """Tell the other machines not to wait, for as long as they can be told."""
        farewell = threading.Thread(target=self._worker_group.spec.rdzv_handler.shutdown, daemon=True)
        farewell.start()
        farewell.join(_FAREWELL_S)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        for path in self._folder.iterdir():
            path.unlink()
        self._give_fresh_store(worker_group)
        os.environ[_NO_SHARED_STORE] = "0"  # or the first worker would want to make one, too
        with self._signals.held_back():
            started: dict[int, Any] = super()._start_workers(worker_group)
            for local_rank, pid in started.items():
                worker_group.workers[local_rank].id = pid  # torch does it later; a signal may come before
            self.has_workers = True
        os.environ[_NO_SHARED_STORE] = "1"
        os.environ[RESTARTED] = "1"  # for those started next
        return started

    def _give_fresh_store(self, group: WorkerGroup) -> None:
        """Let the workers meet in a store of this attempt, which outlives them.

        Torch gives all attempts the same one. There the workers of the second find the addresses of the first's, and
        wait for each other for ever when the first process was the one lost.
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
                self._asking_since = time.monotonic()  # whether other machines wait to join
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
        """Nobody reads the events. Torch looks up this machine's name for each: 10 s where no name server answers."""
        return Event(f"torchelastic.worker.status.{state}", source)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        super()._stop_workers(worker_group)
        self.has_workers = False
        self._signals.release()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, *arguments: Any, **keywords: Any) -> None:
        """Signal the workers and wait for them; those that come meanwhile reach them too, and break no wait."""

        def pass_on(number: int, _frame: FrameType | None) -> None:
            self._signals.wait(number)  # or workers that are lost would be started again
            self._signal_workers(number)

        self._asking_since = None
        with _signal_handlers_restored():
            for number in stop_signals():
                signal.signal(number, pass_on)
            # A closed terminal, too, is a reason to save.
            sent = signal.SIGINT if death_sig == signal.SIGINT else signal.SIGTERM
            super()._shutdown(sent, *arguments, **keywords)

    def _end_when_cut_off(self) -> None:
        """Torch waits for an answer of machine 0 as long as the network lets it: many minutes, if a cable is out."""
        looks, before = 0, None
        while looks < _ANSWER_S:  # counted in looks, because this process may be suspended meanwhile
            time.sleep(1)
            looks = looks + 1 if self._asking_since is not None and self._asking_since == before else 0
            before = self._asking_since
        self._signal_workers(signal.SIGTERM)
        console.fail(f"{self._endpoint}: {_NO_ANSWER}")
        time.sleep(_FAREWELL_S)
        self._signal_workers(signal.SIGKILL)
        os._exit(1)

    def _signal_workers(self, number: int) -> None:
        for worker in self._worker_group.workers:
            with contextlib.suppress(ProcessLookupError, TypeError):
                os.killpg(worker.id, number)

    def outcomes(self, result: RunResult, began: float) -> list[Outcome]:
        """How the workers of this machine ended that did not finish; those without a word by their exit codes."""
        told = {outcome.rank: outcome for outcome in read_outcomes(self._folder)}
        size = self._worker_group.workers[0].world_size
        silent = [
            _silent_outcome(failure, rank, size, began) for rank, failure in result.failures.items() if rank not in told
        ]
        return [*told.values(), *silent]

    def result_after_signal(self) -> RunResult:
        """The exit codes, once all workers have ended."""
        result: RunResult = super()._monitor_workers(self._worker_group)
        return result


def _store_on_all_interfaces(host: str) -> TCPStore:
    return TCPStore(host, 0, is_master=True, wait_for_workers=False)


def _store_on_loopback() -> TCPStore:
    """A store that only this machine reaches; one that makes its own socket listens on all interfaces."""
    with socket.create_server((_LOOPBACK, 0)) as listening:
        port = listening.getsockname()[1]
        return TCPStore(_LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())


def first_of(outcomes: Sequence[Outcome]) -> Outcome:
    """The one that explains the others: the earliest that is not a consequence, if there is any."""
    return min(outcomes, key=lambda outcome: (outcome.kind == "consequence", outcome.time))


def _silent_outcome(failure: ProcessFailure, rank: int, size: int, began: float) -> Outcome:
    code = failure.exitcode
    number = -code if code < 0 else code - 128  # the shell's convention, in which a second Ctrl-C is 130
    # The agent itself ends the others by SIGTERM as soon as one has failed, and kills them later.
    by_agent = number in (signal.SIGTERM, signal.SIGINT) or failure.timestamp > began + _GRACE_S / 2
    if number > 0:
        memory = ", perhaps because memory ran out" if number == signal.SIGKILL else ""
        message = f"was killed by {_signal_name(number)}{memory}"
    else:
        message = f"ended with exit code {code} and left no word"
    kind: Kind = "consequence" if by_agent else "crashed"
    return Outcome(kind, 1, message, rank, size, socket.gethostname(), failure.timestamp)


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def _sentence(outcome: Outcome) -> str:
    if outcome.kind == "hung":  # names those that are behind, mostly others
        return outcome.message
    separator = " " if outcome.message.startswith(("was killed", "ended with")) else ": "
    return f"{outcome.place}{separator}{outcome.message}"


def _tell(first: Outcome) -> int:
    if first.kind == "stopped":
        console.say(f"stopped: {first.message}")
    else:
        # What the user asked for is wrong in every process alike.
        console.fail(first.message if first.exit_code == 2 else _sentence(first))
    return first.exit_code


def _tell_after_signal(agent: _Agent | None, number: signal.Signals) -> int:
    if (agent is None or not agent.has_workers) and RESTARTED not in os.environ:
        console.say(f"stopped: {number.name} before the processes were started")
        return 128 + number
    if agent is None or not agent.has_workers:
        console.say(f"stopped: {number.name} while the processes are started again; to go on, add --resume")
        return RunInterrupted.exit_code
    result = agent.result_after_signal()
    outcomes = agent.outcomes(result, began=0.0)
    if not outcomes:
        return 0
    first = first_of(outcomes)
    if first.kind == "consequence":  # killed by the signal, before there was anything to save, or for not ending
        console.fail(f"{number.name}: {_sentence(first)}; what was not in a checkpoint is lost")
        return 128 + number
    return _tell(first)


def _rendezvous_message(config: LaunchConfig, error: Exception) -> str:
    place = config.rdzv_endpoint
    if isinstance(error, RendezvousClosedError):
        return f"{place}: the run has ended on another machine, which tells why"
    if isinstance(error, RendezvousTimeoutError):
        return f"{place}: not all of the {config.min_nodes} machines came in time; start the same command on each"
    if isinstance(error, RendezvousConnectionError) and config.rdzv_configs.get("is_host") in (1, "1"):
        return f"{place}: cannot listen there; is the port taken, or the address another machine's?"
    return f"{place}: {_NO_ANSWER}"


class _Signals:
    """The launcher's signal handler. Torch's own raises at once, also while nobody knows the workers just started."""

    def __init__(self) -> None:
        self._held_back = True
        self._waiting: signal.Signals | None = None

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        if not self._held_back:
            raise SignalException(f"got signal {number}", signal.Signals(number))
        self.wait(number)

    def wait(self, number: int) -> None:
        """Have the signal raise `SignalException` at the next `release`."""
        self._waiting = self._waiting or signal.Signals(number)

    def release(self) -> None:
        """Raise for a signal that waits, and for those that come now."""
        self._held_back = False
        if self._waiting is not None:
            self(self._waiting, None)

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        """Signals that come in here, or waited, raise `SignalException`; after it they are ignored: all is over."""
        try:
            self.release()
            yield
        finally:
            self._held_back = True

    @contextlib.contextmanager
    def held_back(self) -> Iterator[None]:
        """Signals wait until the end; processes that are started meet no Ctrl-C before `begin_worker`."""
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
    """A private folder for what the workers leave."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="asgo-")
    except OSError as error:
        raise AsgoError(f"no temporary folder can be written ({error.strerror}); set TMPDIR to one") from error
    with folder as name:
        yield Path(name)


@contextlib.contextmanager
def _signal_handlers_restored() -> Iterator[None]:
    """Undo what is done to signal handlers in here; torch leaves its own behind."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
