"""Runs training jobs by several processes on this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.config import RunConfig
from pipelines.training.lineage import BranchPoint

ROOT = Path(__file__).parents[3]
WORKER = Path(__file__).with_name("worker.py")


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


def start(
    jobs: list[Job], size: int, scratch: Path, of_ranks: Sequence[Mapping[str, str]] = ()
) -> list[subprocess.Popen[str]]:
    """Start `size` processes that carry out the jobs together, one after the other.

    `of_ranks` has environment variables that each has besides.
    """
    described = [
        {
            "config": job.config.model_dump(mode="json"),
            "out": str(job.out),
            "resume": job.resume,
            "double": job.double,
            "branch": str(job.branch or ""),
            "port": free_port(),
        }
        for job in jobs
    ]
    scratch.mkdir(parents=True, exist_ok=True)
    path = scratch / f"jobs-{free_port()}.json"
    path.write_text(json.dumps(described), encoding="utf-8")
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1"}
    shared["TORCHELASTIC_RUN_ID"] = "tests"  # or one alone would not make a group
    return [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(path)],
            env={
                **shared,
                **(of_ranks[rank] if of_ranks else {}),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(size),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]


def carry_out(jobs: list[Job], size: int, scratch: Path) -> list[str]:
    """Do the jobs by `size` processes; returns what each of them printed. An error in one is an `AssertionError`."""
    processes = start(jobs, size, scratch)
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * size, "\n".join(outputs)
    return outputs
