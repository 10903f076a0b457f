"""Behaviour of a process that a launcher started: only rank 0 prints, and outcomes go to the launcher."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import socket
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from asgo_cli import console
from pipelines.errors import UsageError
from pipelines.training.launched import Place, launched

OUTCOMES = "ASGO_OUTCOMES"
"""Environment variable: the folder where the processes of `asgo train --gpus` write their outcomes."""

LAUNCHER = "ASGO_LAUNCHER"
"""Environment variable: the process id of the launcher."""

Kind = Literal["stopped", "refused", "crashed", "hung", "consequence", "ended"]
"""stopped: stopped and saved; refused: an error that a restart would repeat; crashed: one that it may not repeat;
hung: the run is stalled; consequence: an error caused by the end of another process; ended: by its launcher."""

_PR_SET_PDEATHSIG = 1
_LOST_CONNECTION = re.compile(r"gloo.*(connect|closed|reset|broken pipe|timed out)", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Outcome:
    """How a process ended before it finished."""

    kind: Kind
    exit_code: int
    message: str
    rank: int = field(default_factory=lambda: _place().rank)
    size: int = field(default_factory=lambda: _place().size)
    host: str = field(default_factory=socket.gethostname)
    time: float = field(default_factory=time.time)

    @property
    def place(self) -> str:
        """The process in a message: rank, number of processes, host."""
        return f"process {self.rank} of {self.size} ({self.host})"

    @property
    def sentence(self) -> str:
        """The message, with the place if it is about this process alone."""
        # Exit code 2: wrong usage or configuration, which is the same on every rank.
        if self.kind in ("hung", "ended") or self.exit_code == 2:
            return self.message
        separator = " " if self.message.startswith(("was killed", "ended with")) else ": "
        return f"{self.place}{separator}{self.message}"

    @property
    def may_restart(self) -> bool:
        """Whether the run may succeed if its processes are started again."""
        return self.kind in ("crashed", "hung", "consequence")


def is_worker() -> bool:
    """Return whether a launcher (torchrun, by hand or through `--gpus`, or another) started this process."""
    try:
        return launched() is not None
    except UsageError:
        return False  # the training command raises it


def is_restarted() -> bool:
    """Return whether the launcher started this process to replace a lost one."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def begin_worker() -> None:
    """Silence this process unless it is rank 0, and make it stop when the launcher ends."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Default action, until training sets a handler: a process that waits for others in C++ runs no Python handler.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # the launcher blocked it until here
    place = _place()
    if not place.by_torchrun and (place.rank == 0 or console.is_live()):
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        console.say(f"{place}, from RANK and WORLD_SIZE; rendezvous at {address}")
    if place.rank:
        console.silence()
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
    if OUTCOMES in os.environ:
        # A killed launcher passes no signal on: its processes would keep training, unseen, beside a resumed run.
        end_with_parent()
        if os.getppid() != int(os.environ[LAUNCHER]):  # the launcher ended before the line above took effect
            console.fail(f"{place}: its launcher has ended")
            sys.exit(1)


def end_with_parent() -> None:
    """Send this process SIGTERM, to save and stop, when its parent ends. Linux only."""
    if sys.platform == "linux":
        import ctypes  # rarely needed

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def end_worker(kind: Kind, exit_code: int, message: str) -> None:
    """Report to the launcher how this process ends; without a launcher, to the user."""
    outcome = Outcome(kind, exit_code, message)
    folder = os.environ.get(OUTCOMES)
    if folder is not None:
        with contextlib.suppress(OSError):
            _write(outcome, Path(folder))
            return
    if kind == "stopped":
        console.say(f"stopped: {message}")
    else:
        console.fail("\n".join(f"{outcome.place}: {line}" for line in message.splitlines()))


def read_outcomes(folder: Path) -> list[Outcome]:
    """Return the outcomes that the processes of this machine wrote."""
    return [Outcome(**json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("*.json"))]


def is_lost_connection(error: BaseException | None) -> bool:
    """Return whether the error, or a cause of it, is a collective that failed because another process ended."""
    distributed = sys.modules.get("torch.distributed")
    while error is not None:
        if distributed is not None and isinstance(error, distributed.DistError):
            return True
        if isinstance(error, RuntimeError) and _LOST_CONNECTION.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _place() -> Place:
    place = launched()
    assert place is not None, "this process is no worker"
    return place


def _write(outcome: Outcome, folder: Path) -> None:
    part = folder / f"{outcome.rank}.part"
    part.write_text(json.dumps(asdict(outcome)), encoding="utf-8")
    part.rename(folder / f"{outcome.rank}.json")
