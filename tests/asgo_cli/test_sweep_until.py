"""`asgo sweep --until-certain` as a user types it."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pipelines.resolve import assignment_layer
from pipelines.sweeps.definition import read_sweep, resolve_runs
from pipelines.training.train import train
from tests.asgo_cli.test_sweep import DIVERGING, ENVIRONMENT, GOOD, asgo, command, run_sweep, write_sweep
from tests.conftest import SilentReporter
from tests.long import long

TIED = ({"name": "a", "optimizer.name": "adamw"}, {"name": "b", "optimizer.name": "adamw", "model.d_ff": 40})


def test_finished_runs_are_judged_and_not_trained_again(
    token_folder: Path,
    tmp_path: Path,
    reporter: SilentReporter,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    definition = write_sweep(tmp_path / "my.toml", token_folder, *GOOD)
    for run in resolve_runs(read_sweep(str(definition)), assignment_layer([]), [1, 2, 3]):
        train(run.config, Path("runs/my", run.name), reporter)
    command_line = ("my.toml", "--until-certain", "--max-seeds", 3)
    assert asgo(monkeypatch, *command_line, "--json") == 0
    captured = capsys.readouterr()
    results = json.loads(captured.out)
    (verdict,) = results["verdicts"]
    assert {verdict["first"], verdict["second"]} == {"a", "b"}
    assert (results["seeds"], results["runs"], results["runs_with_all_seeds"]) == ({"a": 3, "b": 3}, 6, 6)
    assert [look["seeds"] for look in results["looks"]] == [3]
    assert captured.err.splitlines()[-1] == "next: asgo compare runs/my"
    assert json.loads(Path("runs/my/until-certain.json").read_text())["seeds"] == [1, 2, 3]
    assert asgo(monkeypatch, *command_line) == 0
    assert f"{int(verdict['outcome'] != 'cannot tell')} of 1 pairs decided" in capsys.readouterr().out
    for options in ([], ["--dry-run"]):
        assert asgo(monkeypatch, "my.toml", "--until-certain", *options) == 2
        assert "a sweep until certain began here with seeds: 1, 2, 3 there, 1, 2, 3, 4, 5" in capsys.readouterr().err
    assert asgo(monkeypatch, *command_line, "--against", "a") == 2
    assert "began here with against: all pairs there, a now; choose another --out" in capsys.readouterr().err
    assert asgo(monkeypatch, "my.toml", "--seeds", "3,9", "--dry-run") == 2
    assert "the tests leave out seeds other than 1, 2, 3: a-s9, b-s9; give --until-certain" in capsys.readouterr().err


def test_a_dry_run_shows_the_least_and_the_highest_cost(
    token_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    definition = write_sweep(tmp_path / "my.toml", token_folder, *GOOD)
    assert asgo(monkeypatch, definition, "--until-certain", "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    a_run = 6 * 4 * 16
    assert (len(plan["runs"]), plan["tokens"]) == (6, 6 * a_run)
    assert (plan["runs_at_most"], plan["tokens_at_most"]) == (16, 16 * a_run)
    assert asgo(monkeypatch, definition, "--until-certain", "--dry-run", "--max-seeds", 5) == 0
    assert f"at most 10 runs   {10 * a_run:,} tokens" in capsys.readouterr().out
    table = {"trials": 3, "space": {"optimizer.lr": {"factor": 10.0, "points": 3}}}
    definition = write_sweep(tmp_path / "searched.toml", token_folder, *GOOD, search=table)
    assert asgo(monkeypatch, definition, "--until-certain", "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["tokens"], plan["tokens_at_most"]) == (12 * a_run, 22 * a_run)
    assert {path.name for path in tmp_path.iterdir()} == {"my.toml", "searched.toml"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-seeds", "5"], "--max-seeds and --against are for --until-certain"),
        (["--against", "a"], "--max-seeds and --against are for --until-certain"),
        (["--until-certain", "--against", "c"], "--against c: no contender has this name; choose one of a, b"),
        (
            ["--until-certain", "--seeds", "1"],
            "until certain: before the first look, the number of seeds is 1, and at most it is 8",
        ),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: list[str],
    message: str,
    token_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    definition = write_sweep(tmp_path / "my.toml", token_folder, *GOOD)
    assert asgo(monkeypatch, definition, *arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1, err
    assert list(tmp_path.iterdir()) == [definition]


@long
def test_a_killed_sweep_goes_on_to_the_same_record(token_folder: Path, tmp_path: Path) -> None:
    """Of a tied pair and a contender that diverges, which is no failure."""
    arguments = ("my.toml", "--until-certain", "--seeds", "1,2", "--max-seeds", 3, "--slots", 2, "--json")
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        write_sweep(tmp_path / name / "my.toml", token_folder, *TIED, DIVERGING)
    whole = run_sweep(tmp_path / "whole", *arguments)
    assert whole.returncode == 0, whole.stderr
    killed = tmp_path / "killed"
    process = subprocess.Popen(command(*arguments), cwd=killed, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while not (killed / "runs/my/a-s2/metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    resumed = run_sweep(killed, *arguments)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout) == json.loads(whole.stdout)
    records = [(tmp_path / name / "runs/my/until-certain.json").read_bytes() for name in ("whole", "killed")]
    assert records[0] == records[1]
    results = json.loads(whole.stdout)
    assert (results["diverged"], results["seeds"]["wild"]) == (["wild"], 2)
    again = run_sweep(killed, *arguments[:-1])
    assert again.returncode == 0, again.stderr
    assert "0 of 3 pairs decided" in again.stdout  # a pair with a diverged contender stays undecided


@long
def test_the_final_runs_of_a_search_get_seeds_until_certain(token_folder: Path, tmp_path: Path) -> None:
    table = {"trials": 3, "space": {"optimizer.lr": {"factor": 10.0, "points": 3}}, "seed": 2}
    write_sweep(tmp_path / "my.toml", token_folder, *TIED, search=table)
    arguments = ("my.toml", "--until-certain", "--max-seeds", 4, "--slots", 2, "--json")
    result = run_sweep(tmp_path, *arguments)
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "runs/my/until-certain.json").read_text())
    assert record["seeds"] == [1, 3, 4, 5]
    results = json.loads(result.stdout)
    assert results["seeds"].keys() == {"a", "b"}
    trained = {path.name for path in (tmp_path / "runs/my").glob("*-s*")}
    assert len(trained) == results["runs"]
    assert {f"{name}-s{seed}" for name in "ab" for seed in (1, 3, 4)} <= trained
    again = run_sweep(tmp_path, *arguments)
    assert json.loads(again.stdout) == results
