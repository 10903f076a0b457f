"""Real processes that form a process group, and run the jobs that a test gives them."""

from __future__ import annotations

import datetime
import multiprocessing
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from optim.matrix_functions import use_bfloat16_on_cpu
from tests import forks

_TIMEOUT = datetime.timedelta(seconds=60)


class Ranks:
    """Processes that stay for many jobs, since starting one takes seconds; they start with the first job."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[Any] = []
        self._ends: list[Connection] = []
        self._folder = ""

    def run(self, job: Callable[..., Any], *args: Any) -> list[Any]:
        """What `job(*args)` returns on each rank; where one fails, its traceback, and the next job finds new ones."""
        if not self._processes:
            self._start()
        for end in self._ends:
            end.send((job, args))
        answers = []
        for rank, end in enumerate(self._ends):
            arrived = end.poll(2 * _TIMEOUT.total_seconds())
            is_good, answer = end.recv() if arrived else (False, "no answer")
            if not is_good:
                self.stop()
                raise AssertionError(f"on rank {rank}: {answer}")
            answers.append(answer)
        return answers

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._processes, self._ends = [], []

    def _start(self) -> None:
        self._folder = tempfile.mkdtemp()
        meeting_point = Path(self._folder) / "store"
        for rank in range(self.size):
            end, other = multiprocessing.Pipe()
            self._processes.append(forks.start(_serve, rank, self.size, meeting_point, other))
            self._ends.append(end)


@contextmanager
def ranks(size: int) -> Iterator[Ranks]:
    """Processes for as long as the context lasts."""
    group = Ranks(size)
    try:
        yield group
    finally:
        group.stop()


def _serve(rank: int, size: int, meeting_point: Path, end: Connection) -> None:
    torch.set_num_threads(1)
    use_bfloat16_on_cpu(False)  # as the fixture of conftest.py does in the process of the test
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=size, timeout=_TIMEOUT)
    while True:
        job, args = end.recv()
        try:
            end.send((True, job(*args)))
        except Exception:
            end.send((False, traceback.format_exc()))
