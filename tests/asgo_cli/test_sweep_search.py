"""`asgo sweep` of a search as a user types it, with real processes."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w

from asgo_cli.sweep_runs import _program
from pipelines.resolve import assignment_layer
from pipelines.sweeps.contenders import plan_search
from pipelines.sweeps.definition import SweepRun, read_sweep
from pipelines.sweeps.queue import Ending, FixedRuns, carry_out
from pipelines.sweeps.search import open_search
from pipelines.sweeps.slots import Slot
from pipelines.sweeps.status import RunStatus
from pipelines.training.metrics import Row
from pipelines.training.train import train
from tests.asgo_cli.test_sweep import ENVIRONMENT, asgo, command, final_weights, run_sweep, wait_for_steps
from tests.conftest import SMALL, SilentReporter
from tests.long import long

LONG = {"training.steps": 400, "checkpoint.every": 100, "evaluation.every": 200}
"""About two seconds of training: enough to be killed in."""


def write_search(path: Path, data: Path, **search: object) -> Path:
    table = {"trials": 3, "space": {"optimizer.lr": {"factor": 10.0, "points": 3}}, **search}
    settings = {**SMALL, **LONG, "data.folder": str(data), "seeds": [1]}
    runs = [{"name": "a", "optimizer.name": "adamw"}]
    path.write_text(tomli_w.dumps({"task": "gpt", "preset": "tiny", **settings, "runs": runs, "search": table}))
    return path


@long
def test_a_search_that_is_killed_goes_on_to_the_same_end(
    token_folder: Path,
    tmp_path: Path,
    reporter: SilentReporter,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lr = {"low": 1e-3, "high": 1e-1, "log": True}
    definition = write_search(
        tmp_path / "my.toml", token_folder, trials=2, sampler="random", space={"optimizer.lr": lr}
    )
    out = tmp_path / "runs/my"
    process = subprocess.Popen(command("my.toml"), cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    wait_for_steps(out / "trials/a-t0", process=process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert not list((out / "trials").glob("a-t0/checkpoints/step-00000400")), "killed in time"
    result = run_sweep(tmp_path, "my.toml", "--json")
    assert result.returncode == 0, result.stderr

    alone = open_search(plan_search(read_sweep(str(definition)), assignment_layer([])), tmp_path / "alone")
    while (run := alone.next()) is not None:
        train(run.run.config, run.folder, reporter)
        alone.ended(run, Ending("done", "done"))
    assert sorted(path.name for path in (out / "trials").glob("a-*")) == ["a-t0", "a-t1"]
    for name in ("trials/a-t0", "trials/a-t1", "a-s1"):
        assert final_weights(out / name) == final_weights(tmp_path / "alone" / name)
    (expected,), (row,) = alone.results(), json.loads(result.stdout)["contenders"]
    assert (row["trials"], row["best"], row["best_loss"]) == (2, expected.settings, expected.value)
    assert row["final_losses"] == [{"seed": 1, "loss": alone.final_values()["a-s1"]}]
    assert json.loads((out / "trials/search.json").read_text())["contenders"] == ["a"]

    monkeypatch.chdir(tmp_path)
    assert asgo(monkeypatch, "my.toml", "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["tokens"], plan["tokens_left"]) == (3 * 400 * 4 * 16, 0)
    assert plan["contenders"][0]["trials_done"] == 2


def test_a_run_that_is_given_up_ends_before_its_last_step(
    token_folder: Path,
    tmp_path: Path,
    small_config,
    reporter: SilentReporter,  # type: ignore[no-untyped-def]
) -> None:
    class GivesUp(FixedRuns):
        def recorded(self, run: RunStatus, row: Row) -> bool:
            return row["step"] > 0

    told = []

    class Reporter:
        def started(self, run: RunStatus, slot: int) -> None: ...
        def progressed(self, run: RunStatus, slot: int, row: Row) -> None: ...
        def ended(self, run: RunStatus, slot: int, how: str) -> None:
            told.append(how)

    endless = SweepRun("a-t0", "a", small_config(training__steps=10**8, metrics__every=100))
    run = RunStatus(endless, tmp_path / "a-t0", 0, begun=False)
    assert carry_out(GivesUp([run]), tmp_path, [Slot(1)], _program(), Reporter()) == []  # type: ignore[arg-type]
    assert told == ["stopped"]
    assert list((tmp_path / "a-t0/checkpoints").glob("step-*"))


def test_a_dry_run_shows_the_grid_and_the_cost_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert asgo(monkeypatch, "asgo-nanogpt-search", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "0 of 12" in shown
    tokens = (12 * 1_200 + 3 * 2_400) * 8 * 256 * 256
    assert f"96 trials and 24 final runs   {tokens:,} tokens, {tokens:,} of them left" in shown
    assert list(tmp_path.iterdir()) == []
    definition = write_search(tmp_path / "my.toml", tmp_path, pruner="median")
    assert asgo(monkeypatch, definition, "--dry-run") == 0
    assert f"at most {4 * 400 * 4 * 16:,} tokens" in capsys.readouterr().out
    definition = write_search(tmp_path / "my.toml", tmp_path, steps=100)
    assert asgo(monkeypatch, definition, "--dry-run") == 0
    shown = capsys.readouterr()
    assert f"{(3 * 100 + 400) * 4 * 16:,} tokens" in shown.out
    assert "shorter trials: training.steps 400 → 100, evaluation.every 200 → 50\n" in shown.err
    assert list(tmp_path.iterdir()) == [definition]


@long
def test_more_trials_are_written_in_the_file_and_the_hint_says_how(
    token_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    short = {"training.steps": 4, "evaluation.every": 4}
    text = write_search(tmp_path / "my.toml", token_folder, steps=2, storage=f"{tmp_path}/x.log").read_text()
    for key, value in short.items():
        text = re.sub(rf'^"{key}" = .*$', f'"{key}" = {value}', text, flags=re.MULTILINE)
    (tmp_path / "my.toml").write_text(text)
    assert asgo(monkeypatch, "my.toml") == 0
    words = " ".join(capsys.readouterr().err.split())
    assert "lies on the edge of the tried values of lr" in words
    assert "write trials = 5 in my.toml, and continue: asgo sweep my.toml --out runs/my" in words
    (tmp_path / "my.toml").write_text(text.replace("trials = 3", "trials = 5"))
    before = sorted((tmp_path / "runs").rglob("*"))
    assert asgo(monkeypatch, "my.toml", "--dry-run") == 0
    assert f"at most {(5 * 2 + 4) * 4 * 16:,} tokens, {(2 * 2 + 4) * 4 * 16:,} of them left" in capsys.readouterr().out
    assert sorted((tmp_path / "runs").rglob("*")) == before
    (tmp_path / "my.toml").write_text(text)
    assert asgo(monkeypatch, "my.toml", "--dry-run") == 0, "the search is not extended yet"
    (tmp_path / "my.toml").write_text(text.replace("trials = 3", "trials = 5"))
    capsys.readouterr()
    assert asgo(monkeypatch, "my.toml", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)["contenders"]
    assert row["trials"] == 5
    assert [final["seed"] for final in row["final_losses"]] == [1]
    assert (tmp_path / "runs/my/trials/superseded/a-s1-t2").is_dir()
    (tmp_path / "runs/other").mkdir()  # of a worker that was not there when the other trials ended
    (tmp_path / "runs/my/trials/superseded/a-s1-t2").rename(tmp_path / "runs/other/a-s1")
    assert asgo(monkeypatch, "my.toml", "--out", "runs/other") == 0
    assert [path.name for path in (tmp_path / "runs/other/trials/superseded").iterdir()] == ["a-s1-t2"]


def test_a_search_without_optuna_names_the_way_to_it(
    token_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "optuna", None)
    for module in ("study", "search"):
        monkeypatch.delitem(sys.modules, f"pipelines.sweeps.{module}", raising=False)
    assert asgo(monkeypatch, write_search(tmp_path / "my.toml", token_folder)) == 2
    assert capsys.readouterr().err == "error: a search needs optuna: pip install 'asgo[search]'\n"
