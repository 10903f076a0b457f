"""What a process that torchrun started does differently: who speaks, and how its end is told to the launcher."""

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
"""Environment variable: the folder in which the processes of `asgo train --gpus` leave their outcomes."""

LAUNCHER = "ASGO_LAUNCHER"
"""Environment variable: the process id of the launcher."""

RESTARTED = "ASGO_RESTARTED"
"""Environment variable, set for processes that take the place of earlier ones, for whatever reason."""

Kind = Literal["stopped", "refused", "crashed", "hung", "consequence"]
"""Stopped and saved; an error that would come again; one that may not; no progress in any process; an error that
another process's end has caused."""

_PR_SET_PDEATHSIG = 1
_LOST_CONNECTION = re.compile(r"gloo.*(connect|closed|reset|broken pipe|timed out)", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Outcome:
    """How a process ended that did not finish."""

    kind: Kind
    exit_code: int
    message: str
    rank: int = field(default_factory=lambda: _place().rank)
    size: int = field(default_factory=lambda: _place().size)
    host: str = field(default_factory=socket.gethostname)
    time: float = field(default_factory=time.time)

    @property
    def place(self) -> str:
        """The process as a user knows it."""
        return f"process {self.rank} of {self.size} ({self.host})"


def is_worker() -> bool:
    """Whether a launcher (torchrun, by hand or through `--gpus`, or another) started this process among several."""
    try:
        return launched() is not None
    except UsageError:
        return False  # for the command to raise, if it trains


def is_restarted() -> bool:
    """Whether torchrun started this process in the place of one that was lost."""
    return RESTARTED in os.environ or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def begin_worker() -> None:
    """Leave all words to the first process, and stop when the launcher is gone."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Until the training heeds it, Ctrl-C ends this process at once: one that waits for the others runs no handler.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # which the launcher has held back until here
    place = _place()
    if not place.by_torchrun and (place.rank == 0 or console.is_live()):
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        console.say(f"{place}, as RANK and WORLD_SIZE say; the processes meet at {address}")
    if place.rank:
        console.silence()
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
    if OUTCOMES in os.environ:
        # A launcher that is killed cannot pass anything on; its processes would go on unseen, beside a resumed run.
        end_with_parent()
        if os.getppid() != int(os.environ[LAUNCHER]):  # gone before it could be noticed
            console.fail(f"{place}: its launcher is gone")
            sys.exit(1)


def end_with_parent() -> None:
    """Have this process asked to save and stop when the one that started it is gone; on Linux alone."""
    if sys.platform == "linux":
        import ctypes  # for processes of a launcher alone

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def end_worker(kind: Kind, exit_code: int, message: str) -> None:
    """Tell the launcher how this process ends; without one, tell the user."""
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
    """What the processes of this machine have left in the folder."""
    return [Outcome(**json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("*.json"))]


def is_lost_connection(error: BaseException | None) -> bool:
    """Whether the error, or one that led to it, is a collective that another process does not answer any more."""
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
