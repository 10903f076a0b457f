"""A run that hangs ends in bounded time and names whom the others wait for; one that goes on is left alone."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.process import BaseProcess
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from pipelines.training.watchdog import Watchdog
from tests import forks
from tests.long import long

TIMEOUT_S = 3.0
BOUND_S = 60.0
"""Much more than the timeout, for a machine under load, and much less than what hangs here would take."""


def serve_store(ports: SimpleQueue[int]) -> None:
    """Keep a store, as the launcher does, until killed."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    ports.put(store.port)
    time.sleep(1000)


def train_together(watchdog: Watchdog, store: dist.Store, rank: int) -> None:
    """Steps that end together, as those of a run do."""
    dist.init_process_group("gloo", store=dist.PrefixStore("group", store), rank=rank, world_size=2)
    for step in range(10_000):
        watchdog.beat(f"step {step}")
        dist.all_reduce(torch.ones(1))
        time.sleep(0.02)


def fall_behind(watchdog: Watchdog, store: dist.Store, rank: int) -> None:
    """Process 1 reads for ever at step 5, while the other goes on to step 60 and waits there."""
    for step in range(6 if rank == 1 else 61):
        watchdog.beat(f"step {step}")
        time.sleep(0.05)
    time.sleep(1000)


def wait_for_each_other(watchdog: Watchdog, store: dist.Store, rank: int) -> None:
    """Nobody is to blame by what is known."""
    watchdog.beat("step 1")
    if rank == 1:
        store.wait(["never"], timedelta(seconds=1000))
    time.sleep(1000)


def go_on(watchdog: Watchdog, store: dist.Store, rank: int) -> None:
    """Steps for longer than a watchdog waits."""
    end = time.monotonic() + 1.3 * TIMEOUT_S
    while time.monotonic() < end:
        watchdog.beat("step 1")
        time.sleep(0.05)


def be_quiet(watchdog: Watchdog, store: dist.Store, rank: int) -> None:
    """One step of half the time that a watchdog waits, in short sleeps, so that a suspension makes it no shorter."""
    watchdog.beat("step 1")
    for _ in range(30):
        time.sleep(TIMEOUT_S / 60)


def run(work: Callable[..., None], port: int, rank: int, folder: Path) -> None:
    """A process of the run: its last words are a file."""
    store = dist.TCPStore("localhost", port, is_master=False, timeout=timedelta(seconds=60))

    def on_hang(message: str) -> None:
        (folder / f"last-words-{rank}").write_text(message)

    with Watchdog(store, rank, 2, TIMEOUT_S, "ab"[rank], on_hang) as watchdog:
        (folder / f"begun-{rank}").touch()
        work(watchdog, store, rank)


@pytest.fixture
def a_run(tmp_path: Path) -> Iterator[Callable[..., SimpleNamespace]]:
    """Start a store and two processes; kill what is left of them."""
    started: list[BaseProcess] = []

    def start(work: Callable[..., None]) -> SimpleNamespace:
        ports: SimpleQueue[int] = forks.context.SimpleQueue()
        server = forks.start(serve_store, ports)
        started.append(server)
        port = ports.get()
        workers = [forks.start(run, work, port, rank, tmp_path) for rank in range(2)]
        started.extend(workers)
        while len(list(tmp_path.glob("begun-*"))) < 2:
            time.sleep(0.01)
        return SimpleNamespace(server=server, workers=workers, folder=tmp_path)

    yield start
    for process in started:
        process.kill()
        process.join()


def last_words(run: SimpleNamespace, rank: int) -> str:
    """What a process that must end by itself, in bounded time and with code 1, has said."""
    run.workers[rank].join(BOUND_S)
    assert run.workers[rank].exitcode == 1
    return (run.folder / f"last-words-{rank}").read_text()


def test_a_suspended_process_is_named_by_the_others(a_run: Callable[..., SimpleNamespace]) -> None:
    run = a_run(train_together)
    time.sleep(1)
    os.kill(run.workers[1].pid, signal.SIGSTOP)
    words = last_words(run, 0)
    assert words.startswith("no progress for 3 s: process 1")
    assert "does not respond" in words


def test_the_process_that_is_behind_is_named(a_run: Callable[..., SimpleNamespace]) -> None:
    run = a_run(fall_behind)
    expected = "no progress for 3 s: process 1 (b) is still at step 5; the others wait for it"
    assert last_words(run, 1) == expected


@long
def test_when_nobody_is_behind_the_line_tells_where_each_process_is(a_run: Callable[..., SimpleNamespace]) -> None:
    run = a_run(wait_for_each_other)
    words = last_words(run, 0)
    assert "process 0 (a) at step 1, in " in words
    assert "process 1 (b) at step 1, in " in words
    assert f"{__name__.rpartition('.')[2]}:" in words


def test_training_goes_on_without_the_store_and_a_hang_is_bounded_all_the_same(
    a_run: Callable[..., SimpleNamespace],
) -> None:
    run = a_run(go_on)
    run.server.kill()
    for worker in run.workers:
        worker.join(BOUND_S)
        assert worker.exitcode == 0
    for path in run.folder.iterdir():
        path.unlink()
    run = a_run(fall_behind)
    run.server.kill()
    assert "the launcher's store does not answer b" in last_words(run, 1)


@long
def test_time_for_which_the_whole_run_was_suspended_does_not_count(a_run: Callable[..., SimpleNamespace]) -> None:
    run = a_run(be_quiet)
    time.sleep(TIMEOUT_S / 6)
    for worker in run.workers:
        os.kill(worker.pid, signal.SIGSTOP)
    time.sleep(1.5 * TIMEOUT_S)
    for worker in run.workers:
        os.kill(worker.pid, signal.SIGCONT)
    for worker in run.workers:
        worker.join(BOUND_S)
        assert worker.exitcode == 0


def test_a_beat_only_counts() -> None:
    """It comes at every step: it neither asks the store, nor takes a lock."""

    class Untouched:
        def __getattr__(self, name: str) -> object:
            raise AssertionError(f"a beat used {name}")

    watchdog = Watchdog(Untouched(), 0, 1, TIMEOUT_S, "a", lambda message: None)  # type: ignore[arg-type]
    vars(watchdog).update(
        {key: Untouched() for key, value in vars(watchdog).items() if not isinstance(value, int | str)}
    )
    watchdog.beat("step 1")
