"""A real Slurm: preempted, killed and timed-out jobs end with the bits of undisturbed ones."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.asgo_cli.test_sweep import ROOT, write_sweep
from tests.long import long
from tests.real_slurm import real_slurm

__all__ = ["real_slurm"]

pytestmark = long
RUNS = ({"name": "a", "optimizer.name": "asgo"}, {"name": "b", "optimizer.name": "adamw"})
SETTINGS = {"training.steps": 2000, "checkpoint.every": 700, "evaluation.every": 1000}
"""More than ten seconds of training."""


@pytest.fixture(autouse=True)
def _environment(real_slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", str(real_slurm))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # also of the jobs
    monkeypatch.chdir(tmp_path)


def output(*words: object) -> str:
    return subprocess.run(list(map(str, words)), check=True, capture_output=True, text=True).stdout


def asgo(*words: object) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "asgo_cli", *map(str, words)], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def submit(*words: object) -> str:
    """Submit, and return the number of the job."""
    match = re.search(r"^job (\d+): ", asgo(*words), re.MULTILINE)
    assert match is not None
    return match[1]


def wait_for(condition: Callable[[], object], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, output("squeue", "--array")
        time.sleep(0.2)


def has_steps(run: Path) -> bool:
    return (run / "metrics.jsonl").is_file() and len((run / "metrics.jsonl").read_bytes()) > 20_000


def is_queue_empty() -> bool:
    """Whether no job is left; lets requeued jobs start soon, for which Slurm waits two minutes."""
    lines = output("squeue", "--array", "--noheader", "--format=%i|%r").splitlines()
    for job in [line.partition("|")[0] for line in lines if line.endswith("|BeginTime")]:
        time.sleep(3)  # a machine that has not yet ended the first attempt refuses the second
        output("scontrol", "update", f"JobId={job}", "StartTime=now")
    return not lines


def bits(run: Path) -> dict[str, object]:
    """Return everything that two equal runs have in common."""
    newest = max((run / "checkpoints").iterdir())
    tensors = {path.name: path.read_bytes() for path in newest.glob("*.safetensors") if path.stem != "history"}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {**tensors, "losses": [(row["split"], row["step"], row["loss"]) for row in rows]}


@pytest.fixture(scope="module")
def undisturbed(token_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """What runs without Slurm end with, by name."""
    folder = tmp_path_factory.mktemp("undisturbed")
    definition = write_sweep(folder / "my.toml", token_folder, *RUNS, **SETTINGS)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "asgo_cli", "sweep", str(definition), "--out", str(folder)]
    subprocess.run(words, env=environment, check=True, capture_output=True)
    return {name: bits(folder / name) for name in ("a-s42", "b-s42")}


@pytest.mark.parametrize("partition", ["low", "polite"])
def test_a_preempted_task_resumes_exactly_and_alone(
    partition: str, token_folder: Path, undisturbed: dict[str, dict[str, object]]
) -> None:
    """Without and with a grace time; the other task of the array still waits."""
    write_sweep(Path("my.toml"), token_folder, *RUNS, **SETTINGS)
    job = submit("sweep", "my.toml", "--slurm", f"partition={partition},cpus=2,jobs=1,time=10")
    wait_for(lambda: has_steps(Path("runs/my/a-s42")))
    output("sbatch", "--partition=high", "--cpus-per-task=2", "--output=/dev/null", "--wrap=sleep 1")
    wait_for(lambda: f"{job}_0|PENDING" in output("squeue", "--array", "--noheader", "--format=%i|%T"))
    states = json.loads(asgo("sweep", "my.toml", "--slurm", "default", "--json").partition("\nnext:")[0])["jobs"]
    assert states[0]["state"].startswith("pending"), "not submitted again"
    assert 0 < int(states[0]["step"].split()[0].replace(",", "")) < 2000
    wait_for(is_queue_empty)
    log = Path(f"runs/my/slurm/{job}_0.out").read_text()
    assert log.count("attempt of job") == 2
    assert "stopped: SIGTERM" in log
    assert Path(f"runs/my/slurm/{job}_1.out").read_text().count("attempt of job") == 1
    assert {name: bits(Path("runs/my", name)) for name in undisturbed} == undisturbed


def test_a_killed_job_fails_and_the_same_command_resumes_it(
    token_folder: Path, undisturbed: dict[str, dict[str, object]]
) -> None:
    write_sweep(Path("my.toml"), token_folder, RUNS[0], **SETTINGS)
    words = ("sweep", "my.toml", "--slurm", "cpus=1,time=10")
    submit(*words)
    run = Path("runs/my/a-s42")
    wait_for(lambda: list(run.glob("checkpoints/step-*")))
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        parts = path.read_bytes().split(b"\0")
        if b"train" in parts and os.fsencode(run.absolute()) in parts and b"srun" not in parts:
            os.kill(int(path.parent.name), signal.SIGKILL)
    wait_for(is_queue_empty)
    assert not (run / "checkpoints/step-00002000").exists()
    submit(*words)
    wait_for(is_queue_empty)
    assert bits(run) == undisturbed["a-s42"]


def test_a_time_limit_requeues_a_job_and_scancel_does_not(token_folder: Path) -> None:
    longer = {**SETTINGS, "training.steps": 12_000, "evaluation.every": 12_000}
    write_sweep(Path("my.toml"), token_folder, RUNS[1], **longer)
    with subprocess.Popen([sys.executable, "-m", "asgo_cli", "sweep", "my.toml", "--out", "undisturbed"]) as reference:
        job = submit("sweep", "my.toml", "--slurm", "cpus=1,time=1,signal=TERM@50")
        log = Path(f"runs/my/slurm/{job}_0.out")
        wait_for(lambda: is_queue_empty() or (log.is_file() and log.read_text().count("attempt of job") == 2))
        assert "DUE TO JOB REQUEUE" in log.read_text()
        output("scancel", job)
        wait_for(is_queue_empty)
        assert log.read_text().count("attempt of job") == 2
        submit("sweep", "my.toml", "--slurm", "cpus=1")
        wait_for(is_queue_empty)
        assert reference.wait() == 0
    assert bits(Path("runs/my/b-s42")) == bits(Path("undisturbed/b-s42"))


def test_training_in_a_folder_with_a_space(token_folder: Path, undisturbed: dict[str, dict[str, object]]) -> None:
    """The options of the command arrive in the job."""
    write_sweep(Path("my.toml"), token_folder, RUNS[1], **SETTINGS)
    asgo("sweep", "my.toml", "--slurm", "hold,cpus=1")  # writes the configuration
    output("scancel", f"--user={os.getuid()}")
    words = ["train", "gpt", "--config", "runs/my/sweep/b-s42.toml", "--out", "runs/100% x", "--slurm", "cpus=1"]
    job = submit(*words)
    wait_for(lambda: has_steps(Path("runs/100% x")))
    assert "running" in asgo(*words)
    output("scancel", "--signal=TERM", job)
    wait_for(is_queue_empty)
    assert Path(f"runs/100% x/slurm/{job}.out").read_text().count("attempt of job") == 2
    assert bits(Path("runs/100% x")) == undisturbed["b-s42"]


def test_two_machines_resume_exactly(token_folder: Path) -> None:
    write_sweep(Path("my.toml"), token_folder, RUNS[1], **{**SETTINGS, "training.steps": 1000})
    asgo("sweep", "my.toml", "--slurm", "hold,cpus=1")  # writes the configuration
    output("scancel", f"--user={os.getuid()}")
    words = ["train", "gpt", "--config", "runs/my/sweep/b-s42.toml"]
    asgo(*words, "--processes", "2", "--out", "undisturbed")
    job = submit(*words, "--processes", "1", "--out", "run", "--slurm", "partition=both,nodes=2,cpus=1")
    wait_for(lambda: has_steps(Path("run")))
    output("scancel", "--signal=TERM", job)
    wait_for(is_queue_empty)
    assert Path(f"run/slurm/{job}.out").read_text().count("attempt of job") == 2
    assert bits(Path("run")) == bits(Path("undisturbed"))
