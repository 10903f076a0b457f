"""A study's journal after kills, full disks, and in the hands of strangers."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.errors import UsageError
from pipelines.sweeps.journal import _Lock
from pipelines.sweeps.study import Claims, Worker, open_storage

WORKER = Worker("a", "here")


def in_process(target: Callable[..., None], *arguments: object) -> int | None:
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    process.join(timeout=60)
    return process.exitcode


def claims_of(journal: Path) -> Claims:
    return Claims(open_storage(None, journal), "study")


def claim(journal: Path) -> int:
    trial = claims_of(journal).add(WORKER, None, {}, {})
    assert trial is not None
    return trial.number


def test_a_journal_torn_by_a_full_disk_goes_on(tmp_path: Path) -> None:
    journal = tmp_path / "study.log"
    assert claim(journal) == 0

    def claim_on_a_full_disk() -> None:
        claims = claims_of(journal)
        resource.setrlimit(resource.RLIMIT_FSIZE, (journal.stat().st_size + 20, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match=r"study\.log"):
            claims.add(WORKER, None, {}, {})

    whole = journal.read_bytes()
    assert in_process(claim_on_a_full_disk) == 0
    assert journal.read_bytes()[: len(whole)] == whole
    assert not journal.read_bytes().endswith(b"\n"), "torn"
    assert [claim(journal), claim(journal)] == [1, 2]
    assert [trial.number for trial in claims_of(journal).held()] == [0, 1, 2]
    assert journal.read_bytes().endswith(b"\n")


def test_a_lock_that_a_kill_leaves_behind_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    journal = Path("runs/study.log")
    assert claim(journal) == 0
    Path("runs/study.log.lock").symlink_to(journal)  # of an earlier version: it points to runs/runs/study.log

    def die_with_the_lock() -> None:
        _Lock(journal).acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_process(die_with_the_lock) == -signal.SIGKILL
    assert in_process(claim, journal) == 0
    assert claim(journal) == 2


@pytest.mark.parametrize(
    "content", [b'{"op_code": 4}\n', b"[[1]]\n", b"\0\0\n{}\n", b"[" * 100_000 + b"\n[]\n"], ids=range(4)
)
def test_a_file_that_is_no_journal_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "study.log").write_bytes(content)
    with pytest.raises(UsageError, match=r"study\.log: not the journal of a search, or damaged; [^\n]+$"):
        open_storage(None, tmp_path / "study.log")
    assert (tmp_path / "study.log").read_bytes() == content
