"""How the launchers of one run, one per machine, start, restart and end it together, through a store on machine 0."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from asgo_cli import console
from asgo_cli.launch import Launch, address_towards, host_and_port
from asgo_cli.worker import Outcome
from pipelines.errors import AsgoError, UsageError

if TYPE_CHECKING:
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

Value = TypeVar("Value")

TICK_S = 0.05
"""Waits are counted in ticks, not measured: a suspended launcher must not find its time used up."""
GRACE_S = 30
"""Seconds from the signal that asks a process to end to the one that kills it."""
_POLL_S = 0.5
_ANSWER_S = 60
_JOIN_S = 600
_READ_S = 10
_PATIENCE_S = 10
"""A message tells what a launcher waits for after this time."""
_LOOPBACK = "127.0.0.1"


class Stopped(Exception):
    """A signal arrived while no process of this machine runs."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number


class CutOff(AsgoError):
    """Machine 0 does not answer."""


class Machines:
    """The launchers of a run. An attempt is one start of all its processes; machine 0 decides how it ends.

    Each machine posts its result of an attempt. The first failure makes all machines end their processes. A machine
    that is started again takes its place in the next attempt. A run on one machine takes the same steps alone.

    Args:
        on_tick: called in every wait; may raise `Stopped`.
    """

    def __init__(self, launch: Launch, on_tick: Callable[[], None]) -> None:
        self._node = launch.node_rank or 0
        self._nodes = launch.nodes or 1
        self._launch = launch
        self._on_tick = on_tick
        self._is_cut_off = False
        self._beats = f"beats/{self._node}"
        self._listening: socket.socket | None = None
        self._store: Any = _Memory()
        if launch.rendezvous is None:
            self._listening = socket.create_server((_LOOPBACK, 0))
            self.host, self.port = self._listening.getsockname()
        else:
            self.host, self.port = host_and_port(launch.rendezvous)
            self._store = self._connect(launch.rendezvous)

    def enter(self) -> int:
        """Return the number of the present attempt. Raises `UsageError` if another machine has this rank."""
        if self._add(f"entered/{self._node}", 1) > 1:  # before this one, by a launcher that was lost if it is silent
            beats = self._add(self._beats, 0)
            self._pause(6 * _POLL_S)
            if self._add(self._beats, 0) > beats:
                raise UsageError(f"--node-rank {self._node}: another machine of this run has the same rank")
        return self._add("attempt", 0)

    def join(self, attempt: int) -> list[int]:
        """Wait until all machines are ready; return the number of processes on each, or nothing if the attempt ends.

        Raises `TimeoutError` if a machine is missing for 10 minutes.
        """
        self._set(f"{attempt}/ready/{self._node}", self._launch.local_size)
        ready = [f"{attempt}/ready/{node}" for node in range(self._nodes)]
        awaited = ready if self._node == 0 else [f"{attempt}/start"]
        if not self._wait_for(awaited, _JOIN_S, stop=f"{attempt}/stop"):
            return []
        if self._node == 0:
            self._set(f"{attempt}/start", [self._get(key) for key in ready])
        return self.sizes(attempt)

    def sizes(self, attempt: int) -> list[int]:
        """Return the number of processes on each machine, or nothing if the attempt has not started."""
        return self._get(f"{attempt}/start") if self._has([f"{attempt}/start"]) else []

    def is_ending(self, attempt: int) -> bool:
        """Return whether a machine has failed, or machine 0 does not answer; `conclude` then raises `CutOff`."""
        try:
            return self._has([f"{attempt}/stop"])
        except CutOff:
            return True

    def conclude(self, attempt: int, outcome: Outcome | None) -> tuple[bool, Outcome | None]:
        """Post how this machine's processes ended; return whether all restart, and the outcome that explains the end.

        None stands for processes that finished.
        """
        self._set(f"{attempt}/result/{self._node}", outcome and asdict(outcome))
        if outcome is not None:
            self._set(f"{attempt}/stop")
        if self._node == 0:
            self._decide(attempt, outcome)
        self._wait_for([f"{attempt}/decision"], math.inf)
        restart, first = self._get(f"{attempt}/decision")
        if restart:
            return True, Outcome(**first)
        self._set(f"{attempt}/read/{self._node}")
        if self._node == 0:  # whose store ends with this process
            with contextlib.suppress(TimeoutError, Stopped):
                self._wait_for([f"{attempt}/read/{node}" for node in self._present(attempt, "result")], _READ_S)
        return False, first and Outcome(**first)

    def _decide(self, attempt: int, outcome: Outcome | None) -> None:
        """Wait for the results of the machines that joined; then post whether all restart, and why."""
        results = [f"{attempt}/result/{node}" for node in self._present(attempt, "ready")]
        with contextlib.suppress(TimeoutError, Stopped):
            self._wait_for(results, _JOIN_S if outcome is None else 2 * GRACE_S)
        posted = [self._get(f"{attempt}/result/{node}") for node in self._present(attempt, "result")]
        first = first_of([Outcome(**result) for result in posted if result is not None])
        restart = first is not None and first.may_restart and attempt < self._launch.max_restarts
        self._add("attempt", int(restart))
        self._set(f"{attempt}/decision", [restart, first and asdict(first)])

    def open_store(self) -> None:
        """Open the store of the processes of one machine, unless it is open. Those of several share the launchers'.

        The processes may start before: their connections wait. So they load torch while this process does.
        """
        if self._listening is not None:
            self._processes_store = self._ask(partial(_loopback_store, self._listening), _JOIN_S)
            self._listening = None

    def _connect(self, rendezvous: str) -> PrefixStore:
        from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

        is_host = self._node == 0
        address_towards(rendezvous, is_host)  # a store would try an unknown name for all the time
        address = self.host, self.port
        timeout = timedelta(seconds=_ANSWER_S if is_host else _JOIN_S)
        try:
            store = self._ask(lambda: TCPStore(*address, None, is_host, timeout, wait_for_workers=False), _JOIN_S)
        except CutOff as error:
            hint = "cannot listen there; is the port in use, or is this another machine's address?"
            raise AsgoError(f"{rendezvous}: {hint}") if is_host else error from None
        return PrefixStore(f"launchers-of-{self._nodes}", store)

    def _wait_for(self, keys: Sequence[str], seconds: float, stop: str | None = None) -> bool:
        """Wait until all keys are set and return True; return False if `stop` is set. Raises `TimeoutError`."""
        waited = 0.0
        while not self._has(keys):
            if stop is not None and self._has([stop]):
                return False
            if waited >= seconds:
                raise TimeoutError
            if waited == _PATIENCE_S:
                console.say(f"{self._launch.rendezvous}: waiting for the other machines")
            self._pause(_POLL_S)
            waited += _POLL_S
        return True

    def _present(self, attempt: int, name: str) -> list[int]:
        """Return the machines that have posted under a name."""
        return [node for node in range(self._nodes) if self._has([f"{attempt}/{name}/{node}"])]

    def _has(self, keys: Sequence[str]) -> bool:
        """Return whether all keys are set, and show that this launcher lives."""
        self._add(self._beats, 1)
        return not keys or self._ask(lambda: bool(self._store.check(list(keys))))

    def _get(self, key: str) -> Any:
        return json.loads(self._ask(lambda: self._store.get(key)))

    def _set(self, key: str, value: object = None) -> None:
        self._ask(lambda: self._store.set(key, json.dumps(value)))

    def _add(self, key: str, amount: int) -> int:
        return self._ask(lambda: int(self._store.add(key, amount)))

    def _pause(self, seconds: float) -> None:
        for _ in range(round(seconds / TICK_S)):
            time.sleep(TICK_S)
            self._on_tick()

    def _ask(self, call: Callable[[], Value], seconds: float = _ANSWER_S) -> Value:
        """Return `call()`, made in a thread: in the main thread, no signal handler would run while it blocks."""
        answer: Future[Value] = Future()

        def work() -> None:
            try:
                answer.set_result(call())
            except Exception as error:
                answer.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        for tick in range(round(seconds / TICK_S) if not self._is_cut_off else 0):
            if wait([answer], TICK_S).done:
                break
            self._on_tick()
            if tick * TICK_S == _PATIENCE_S and self._launch.rendezvous is not None:
                console.say(f"{self._launch.rendezvous}: waiting for machine 0")
        try:
            return answer.result(0)
        except (TimeoutError, RuntimeError):
            self._is_cut_off = True
            no_answer = "no connection to machine 0; is it running, and is the port open?"
            raise CutOff(f"{self._launch.rendezvous}: {no_answer}") from None


class _Memory(dict[str, str]):
    """The store of a launcher alone. It needs no torch, whose import takes longer than all else before the start."""

    set = dict.__setitem__

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)

    def add(self, key: str, amount: int) -> int:
        self[key] = str(int(self.get(key, "0")) + amount)
        return int(self[key])


def _loopback_store(listening: socket.socket) -> TCPStore:
    """Return a store that only this machine can reach: a `TCPStore` that opens its own socket listens everywhere."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    host, port = listening.getsockname()
    return TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())


def first_of(outcomes: Sequence[Outcome]) -> Outcome | None:
    """Return the outcome that explains the others: the earliest one that is not a consequence, if there is any."""
    return min(outcomes, key=lambda outcome: (outcome.kind == "consequence", outcome.time), default=None)
