"""`asgo sweep` as a user types it, with real processes."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tomli_w

from asgo_cli import app as command_line
from asgo_cli import sweep_runs
from pipelines.errors import UsageError
from pipelines.resolve import assignment_layer
from pipelines.sweeps import queue
from pipelines.sweeps.definition import read_sweep, resolve_runs
from pipelines.sweeps.slots import Slot
from pipelines.sweeps.status import RunStatus
from pipelines.training.metrics import Row
from pipelines.training.train import train
from tests.conftest import SMALL, SilentReporter
from tests.long import long

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
DIVERGING = {
    "name": "wild",
    "optimizer.name": "sgd-momentum",
    "optimizer.lr": 1e30,
    "schedule.kind": "constant",
    "schedule.warmup_fraction": 0.0,
    "training.max_grad_norm": 1e30,
}
GOOD = ({"name": "a", "optimizer.name": "asgo"}, {"name": "b", "optimizer.name": "adamw"})
LONG = {"training.steps": 600, "checkpoint.every": 100, "evaluation.every": 300}
"""About three seconds of training: enough to be interrupted in."""


def write_sweep(path: Path, data: Path, *runs: dict[str, object], **common: object) -> Path:
    settings = {**SMALL, "data.folder": str(data), **common}
    path.write_text(tomli_w.dumps({"task": "gpt", "preset": "tiny", **settings, "runs": list(runs)}))
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "asgo_cli", "sweep", *map(str, arguments)]


def run_sweep(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
    )


def wait_for_steps(*runs: Path, process: subprocess.Popen[str]) -> None:
    """Until each of the runs has recorded some steps."""
    while not all(
        (run / "metrics.jsonl").is_file() and len((run / "metrics.jsonl").read_bytes()) > 5000 for run in runs
    ):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def final_weights(run: Path) -> bytes:
    newest = max((run / "checkpoints").iterdir())
    return (newest / "model.safetensors").read_bytes()


@long
def test_a_diverging_run_leaves_the_others_alone_and_is_listed(token_folder: Path, tmp_path: Path) -> None:
    write_sweep(tmp_path / "my.toml", token_folder, GOOD[0], DIVERGING, GOOD[1])
    result = run_sweep(tmp_path, "my.toml", "--slots", 2)
    assert result.returncode == 1, result.stderr
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "run wild-s42 failed: step 2: the loss is" in error
    log = tmp_path / "runs/my/sweep/wild-s42.log"
    assert error.endswith("its log: runs/my/sweep/wild-s42.log")
    assert "the loss is" in log.read_text()
    words = result.stderr.splitlines()
    assert words[:2] == ["a-s42: started, run 1 of 3, slot 0", "wild-s42: started, run 2 of 3, slot 1"]
    assert "b-s42: done" in words
    assert "next: asgo export-metrics runs/my --out my.csv" in words
    states = {line.split()[1]: line.split()[-2] for line in result.stdout.splitlines() if "-s42" in line}
    assert states == {"a-s42": "done", "wild-s42": "failed", "b-s42": "done"}


def test_what_is_done_is_not_done_again(token_folder: Path, tmp_path: Path, monkeypatch, capsys, reporter) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    definition = write_sweep(tmp_path / "my.toml", token_folder, *GOOD)
    for run in resolve_runs(read_sweep(str(definition)), assignment_layer([])):
        train(run.config, Path("runs/my", run.name), reporter)
    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*") if path.is_file()}
    assert asgo(monkeypatch, "my.toml", "--json") == 0
    captured = capsys.readouterr()
    assert "2 of 2 runs are done already" in captured.err
    results = json.loads(captured.out)
    assert results["failures"] == []
    for row in results["runs"]:
        records = [json.loads(line) for line in Path(row["folder"], "metrics.jsonl").read_text().splitlines()]
        last = [record for record in records if record["split"] == "val"][-1]
        assert (row["state"], row["validation_loss"], last["step"]) == ("done", last["loss"], 6)
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(
    ("kill", "count"), [pytest.param(signal.SIGTERM, 2, marks=long), (signal.SIGKILL, 1)], ids=["SIGTERM", "SIGKILL"]
)
def test_a_sweep_that_is_ended_goes_on_to_the_same_end(
    kill: signal.Signals, count: int, token_folder: Path, tmp_path: Path, reporter: SilentReporter
) -> None:
    definition = write_sweep(tmp_path / "my.toml", token_folder, *GOOD[:count], **LONG)
    runs = resolve_runs(read_sweep(str(definition)), assignment_layer([]))
    folders = [tmp_path / "runs/my" / run.name for run in runs]
    process = subprocess.Popen(
        command("my.toml", "--slots", 2), cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    wait_for_steps(*folders, process=process)
    process.send_signal(kill)
    _, err = process.communicate(timeout=60)
    if kill == signal.SIGTERM:
        assert process.returncode == 75, err
        assert "stopped: SIGTERM: all runs are saved; the same command resumes the sweep" in err
        assert all(list((folder / "checkpoints").glob("step-*")) for folder in folders)
    assert not all(list((folder / "checkpoints").glob("step-00000600")) for folder in folders), "ended in time"
    result = run_sweep(tmp_path, "my.toml", "--slots", 2)
    assert result.returncode == 0, result.stderr
    for run, folder in zip(runs, folders, strict=True):
        train(run.config, tmp_path / "alone" / run.name, reporter)
        assert final_weights(folder) == final_weights(tmp_path / "alone" / run.name)
        log = (tmp_path / "runs/my/sweep" / f"{run.name}.log").read_text()
        assert "stopped: SIGTERM at step" in log, "told to save, also when the sweep itself was killed"


class QuietReporter:
    """Keeps what a queue tells."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def started(self, run: RunStatus, slot: int) -> None: ...

    def progressed(self, run: RunStatus, slot: int, row: Row) -> None: ...

    def note(self, message: str) -> None:
        self.told.append(message)

    def ended(self, run: RunStatus, slot: int, how: str) -> None:
        self.told.append(f"{run.run.name}: {how}")


def standings_of(token_folder: Path, folder: Path) -> list[RunStatus]:
    definition = write_sweep(folder / "my.toml", token_folder, *GOOD)
    runs = resolve_runs(read_sweep(str(definition)), assignment_layer([]))
    return [RunStatus(run, folder / "out" / run.name, 0, begun=False) for run in runs]


def test_a_configuration_that_cannot_be_written_fails_its_run_alone(token_folder: Path, tmp_path: Path) -> None:
    runs, reporter = standings_of(token_folder, tmp_path), QuietReporter()
    (tmp_path / "out/sweep/b-s42.toml").mkdir(parents=True)
    failures = queue.carry_out(
        queue.FixedRuns([runs[1], runs[0]]), tmp_path / "out", [Slot(1)], sweep_runs._program(), reporter
    )
    ((name, reason),) = [(failure.name, failure.reason) for failure in failures]
    assert name == "b-s42"
    assert "b-s42.toml" in reason
    assert reason.endswith(": Is a directory")
    assert reporter.told[-1] == "a-s42: done"
    assert final_weights(tmp_path / "out/a-s42")


def test_a_source_that_fails_ends_the_sweep_when_the_runs_at_work_have_ended(
    token_folder: Path, tmp_path: Path
) -> None:
    class FullDisk(queue.FixedRuns):
        def next(self) -> RunStatus | None:
            run = super().next()
            if run is not None and run.run.name == "b-s42":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "study.log")
            return run

    reporter = QuietReporter()
    source = FullDisk(standings_of(token_folder, tmp_path))
    with pytest.raises(OSError, match=r"No space left on device: 'study\.log'"):
        queue.carry_out(source, tmp_path / "out", [Slot(1), Slot(1)], sweep_runs._program(), reporter)
    assert reporter.told == [
        "study.log: No space left on device: no further run starts; running ones continue",
        "a-s42: done",  # not killed
    ]
    assert final_weights(tmp_path / "out/a-s42")


def test_two_sweeps_do_not_work_in_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_config) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(queue, "_LOCK_WAIT_S", 0.1)
    told = []

    class Reporter:
        def note(self, message: str) -> None:
            told.append("waiting")

    (tmp_path / "lock").touch()
    with (tmp_path / "lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another sweep runs here"), queue._locked(tmp_path, Reporter()):
            pytest.fail("the lock was taken")
    with queue._locked(tmp_path, Reporter()):
        assert told == ["waiting"]


def asgo(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["asgo", "sweep", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        command_line.main()
    return int(exit_.value.code or 0)


def test_a_dry_run_shows_runs_and_cost_and_writes_nothing(monkeypatch, capsys, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    assert (
        asgo(monkeypatch, "asro-gpt-paper", "--dry-run", "--json", "--seeds", "1,2", "--set", "training.steps=10") == 0
    )
    plan = json.loads(capsys.readouterr().out)
    assert len(plan["runs"]) == 16
    assert plan["tokens"] == plan["tokens_left"] == 16 * 10 * 40 * 512
    first = plan["runs"][0]
    assert first["run"] == "adam-constant-7.5e-5-s1"
    assert (first["optimizer"], first["lr"], first["steps"], first["state"]) == ("adam", 7.5e-5, 10, "new")
    assert asgo(monkeypatch, "asro-imagenet-paper", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert f"{8 * 305_305 * 256:,} images" in shown
    assert all(
        f" {run.name} " in shown for run in resolve_runs(read_sweep("asro-imagenet-paper"), assignment_layer([]))
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.toml"], "absent.toml: No such file"),
        (["asro-gpt-paper", "--seeds", "1,b"], "--seeds 1,b: write whole numbers with commas"),
        (["asro-gpt-paper"], "data/fineweb: no such data folder; make it with: asgo data fineweb"),
        (["asro-gpt-paper", "--set", "model.n_layer=3"], "--set: model.n_layer: unknown key; did you mean 'n_layers'?"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(monkeypatch, capsys, tmp_path: Path, arguments, message) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    assert asgo(monkeypatch, *arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1, err
    assert list(tmp_path.iterdir()) == []
