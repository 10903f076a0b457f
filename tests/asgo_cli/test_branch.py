"""`asgo train --branch` as a user types it."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.training.run_folder import RunFolder
from tests import command_lines
from tests.conftest import SMALL
from tests.pipelines.training.test_resume import assert_same_run

Asgo = Callable[..., tuple[int, str]]
CONSTANT = ("--set", "schedule.kind=constant", "--set", "schedule.warmup_fraction=0")


@pytest.fixture
def asgo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Asgo:
    """Run a command in an empty folder; returns its exit code and what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str]:
        result = command_lines.asgo(*arguments)
        return result.code, result.out + result.err

    return run


@pytest.fixture(scope="module")
def begin(token_folder: Path) -> tuple[object, ...]:
    settings = [f"--set={key}={value}" for key, value in SMALL.items() if not key.startswith(("training.s", "check"))]
    return ("train", "gpt", "--preset", "tiny", "--optimizer", "asgo", "--data", token_folder, *settings)


@pytest.fixture(scope="module")
def trained(begin: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with checkpoints at 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("trained")
    checkpoints = ("--set", "checkpoint.every=2", "--set", "checkpoint.keep=9")
    done = command_lines.asgo(*begin, *CONSTANT, "--steps", 6, "--out", "trunk", *checkpoints, folder=folder)
    assert done.code == 0, done.err
    return folder / "trunk"


@pytest.fixture
def trunk(asgo: Asgo, trained: Path) -> str:
    """A copy of it in the working directory."""
    shutil.copytree(trained, "trunk")
    return "trunk"


def config(asgo: Asgo, *options: object) -> dict[str, dict[str, object]]:
    code, words = asgo("train", "gpt", "--branch", "trunk@4", "--out", "new", *options, "--print-config")
    assert code == 0, words
    return tomllib.loads(words)


def test_three_lengths_cost_at_most_60_percent_of_three_runs(asgo: Asgo, begin: tuple[object, ...]) -> None:
    """The recipe of docs/training.md at a hundredth of its lengths: a cooldown is the whole run, bit for bit."""
    lengths = {20: 16, 30: 24, 40: 32}
    checkpoints = ("--set", "checkpoint.every=8", "--set", "checkpoint.keep=4", "--set", "evaluation.every=8")
    assert asgo(*begin, *CONSTANT, *checkpoints, "--steps", 32, "--out", "trunk")[0] == 0
    trained = 32
    for length, decay in lengths.items():
        cooldown = ("--set", "schedule.kind=wsd", "--steps", str(length))
        code, words = asgo("train", "gpt", "--branch", f"trunk@{decay}", *cooldown, "--out", f"branch-{length}")
        assert code == 0, words
        own = [row["step"] for row in RunFolder(Path(f"branch-{length}")).rows() if row["split"] == "train"]
        trained += sum(step > decay for step in own)
        assert asgo(*begin, *CONSTANT[2:], *checkpoints, *cooldown, "--out", f"whole-{length}")[0] == 0
        assert_same_run(Path(f"whole-{length}"), Path(f"branch-{length}"), length)
    assert trained == 50
    assert trained <= 0.6 * sum(lengths)
    code, words = asgo("compare", *(f"branch-{length}" for length in lengths), "trunk", "--json")
    assert code == 0, words
    assert '"run": "trunk"' in words
    assert '"step": 16' in words


def test_a_branch_has_the_settings_of_its_parent_and_those_given(asgo: Asgo, trunk: str) -> None:
    parent = json.loads((Path(trunk) / "config.json").read_text())["config"]
    same = config(asgo)
    assert same["preset"] == "tiny"
    assert {key: same[key] for key in ("model", "seed")} == {key: parent[key] for key in ("model", "seed")}
    assert same["optimizer"] == {key: value for key, value in parent["optimizer"].items() if value is not None}
    Path("my.toml").write_text("[training]\nsteps = 8\n[optimizers.asgo]\nlr = 0.25\n")
    changed = config(asgo, "--config", "my.toml", "--set", "schedule.kind=linear")
    assert (changed["training"]["steps"], changed["optimizer"]["lr"]) == (8, 0.25)
    assert (changed["schedule"]["kind"], changed["training"]["batch_size"]) == ("linear", 4)


def test_another_optimizer_has_the_settings_of_the_preset(asgo: Asgo, trunk: str) -> None:
    for options in (("--optimizer", "adamw"), ("--set", "optimizer.name=adamw")):
        branch = config(asgo, *options)
        assert branch["optimizer"]["name"] == "adamw"
        assert branch["optimizer"]["betas"] == [0.9, 0.95]
        assert branch["optimizer"]["lr"] == 1e-3
        assert branch["schedule"]["kind"] == "constant"
    assert config(asgo, "--optimizer", "adamw", "--lr", "0.5")["optimizer"]["lr"] == 0.5


def test_the_same_command_begins_and_resumes(asgo: Asgo, trunk: str) -> None:
    line = ("train", "gpt", "--branch", trunk, "--steps", 10, "--optimizer", "adamw", "--resume", "--out", "longer")
    code, words = asgo(*line)
    assert code == 0, words
    assert "branching from trunk/checkpoints/step-00000006" in words
    assert "adamw begins at step 6 with a new state (before: asgo)" in words
    shutil.rmtree("longer/checkpoints/step-00000010")
    shutil.rmtree(trunk)
    code, words = asgo(*line)
    assert code == 0, words
    assert "resuming from longer/checkpoints/step-0000000" in words
    assert "branching" not in words
    code, words = asgo(*line[:2], "--branch", "trunk@4", *line[4:])
    assert (code, words) == (
        2,
        "error: longer: holds a run that branched from trunk@6, not from trunk@4; choose another --out\n",
    )


def test_a_dry_run_shows_the_branch_and_writes_nothing(asgo: Asgo, trunk: str) -> None:
    code, words = asgo("train", "gpt", "--branch", "trunk@4", "--out", "new", "--dry-run")
    assert code == 0
    assert "from trunk at step 4" in words
    code, words = asgo("train", "gpt", "--branch", "trunk@4", "--out", "new", "--steps", 3, "--dry-run")
    assert (code, words.count("\n")) == (2, 1)
    assert not Path("new").exists()


def test_a_folder_whose_name_has_an_at_sign_is_the_run(asgo: Asgo, trunk: str) -> None:
    Path(trunk).rename("trunk@4")
    code, words = asgo("train", "gpt", "--branch", "trunk@4", "--out", "new", "--steps", 8, "--dry-run")
    assert code == 0, words
    assert "from trunk@4 at step 6" in words
    assert "from trunk@4 at step 2" in asgo("train", "gpt", "--branch", "trunk@4@2", "--out", "new", "--dry-run")[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--branch trunk", "--branch: needs --out FOLDER for the new run"),
        ("--branch trunk --out new --preset tiny", "leave --preset out"),
        ("--branch trunk@last --out new", "--branch trunk@last: should be RUN or RUN@STEP, such as runs/trunk@800"),
        ("--branch nowhere --out new", "--branch nowhere: holds no run"),
        ("--branch trunk@3 --out new", "--branch trunk@3: no such checkpoint; the run has those of steps 2, 4, 6"),
        ("--branch trunk@4 --out trunk", "trunk: already holds a run"),
        ("--branch trunk/checkpoints/step-00000004 --out new", "--branch takes the run that holds it: trunk@STEP"),
        ("--branch trunk@4 --out new --set model.d_model=32", "cannot change this: model.d_model is 16 in the run, 32"),
        ("--branch trunk@4 --out new --data nowhere", "its data folder, nowhere, does not exist in this directory"),
        ("--branch trunk@4 --out new --optimizer adamv", "unknown optimizer 'adamv'; did you mean 'adam'?"),
    ],
)
def test_a_wrong_branch_is_one_line_and_leaves_nothing(asgo: Asgo, trunk: str, options: str, message: str) -> None:
    code, words = asgo("train", "gpt", *options.split())
    assert (code, words.count("\n")) == (2, 1), words
    assert message in words
    assert not Path("new").exists()


def test_a_run_of_another_task_is_refused(asgo: Asgo, trunk: str) -> None:
    code, words = asgo("train", "imagenet", "--branch", "trunk@4", "--out", "new")
    assert (code, words) == (2, "error: --branch trunk: a run of asgo train gpt, not of asgo train images\n")
