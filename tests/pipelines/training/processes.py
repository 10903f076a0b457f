"""Runs training jobs by several processes on this machine."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from pipelines.config import RunConfig, load_run_config
from pipelines.errors import RunInterrupted
from pipelines.training.lineage import BranchPoint
from pipelines.training.train import train
from tests import forks
from tests.conftest import SilentReporter
from tests.pipelines.training.double_precision import double_precision


@dataclass(frozen=True)
class Job:
    """A run: its configuration and folder, and whether it goes on where it is."""

    config: RunConfig
    out: Path
    resume: bool = False
    double: bool = False
    """In float64."""
    branch: BranchPoint | None = None


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(jobs: list[Job], size: int, scratch: Path, of_ranks: Sequence[Mapping[str, str]] = ()) -> list[BaseProcess]:
    """Start `size` processes that carry out the jobs together, one after the other.

    What each prints is in `scratch`. `of_ranks` has environment variables that each has besides.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    told = [
        (job.config.model_dump(mode="json"), job.out, job.resume, job.double, job.branch, free_port()) for job in jobs
    ]
    shared = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(size)}
    shared["TORCHELASTIC_RUN_ID"] = "tests"  # or one alone would not make a group
    return [
        forks.start(
            _carry_out,
            told,
            output=scratch / f"rank-{rank}.txt",
            variables={
                **shared,
                **(of_ranks[rank] if of_ranks else {}),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
            },
        )
        for rank in range(size)
    ]


def carry_out(jobs: list[Job], size: int, scratch: Path) -> None:
    """Do the jobs by `size` processes. An error in one is an `AssertionError` with what it printed."""
    processes = start(jobs, size, scratch)
    try:
        for process in processes:
            process.join(240)
    finally:
        for process in processes:
            process.kill()
    outputs = [path.read_text() for path in scratch.glob("rank-*.txt")]
    assert [process.exitcode for process in processes] == [0] * size, "\n".join(outputs)


def _carry_out(jobs: list[tuple[dict[str, Any], Path, bool, bool, BranchPoint | None, int]]) -> None:
    torch.set_num_threads(1)
    for config, out, resume, double, branch, port in jobs:
        os.environ["MASTER_PORT"] = str(port)
        try:
            with double_precision() if double else contextlib.nullcontext():
                train(load_run_config(config), out, SilentReporter(), resume=resume, branch=branch)
        except RunInterrupted as interrupted:
            sys.exit(interrupted.exit_code)
