"""`asgo claim` as a user types it: it trains what is missing, with real processes, and prints answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import tomli_w

from tests.asgo_cli.test_sweep import DIVERGING, ENVIRONMENT, GOOD, write_sweep


def claim(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "asgo_cli", "claim", *map(str, arguments)]
    return subprocess.run(words, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)


def write_claim(path: Path, sweep: str, contender: str, **more: object) -> Path:
    statement = {"contender": contender, "better_than": "b"}
    path.write_text(tomli_w.dumps({"sweep": sweep, "statement": statement, **more}))
    return path


def test_a_claim_trains_what_is_missing_and_prints_its_answer(token_folder: Path, tmp_path: Path) -> None:
    write_sweep(tmp_path / "my.toml", token_folder, *GOOD, seeds=[1, 2])
    write_claim(tmp_path / "a.toml", "my.toml", "a", title="A claim | with a bar")
    first = claim(tmp_path, "a.toml", "--json", "--slots", 2)
    assert first.returncode == 0, first.stderr
    (found,) = json.loads(first.stdout)["claims"]
    assert found["answer"] in ("holds", "does not hold", "cannot tell")
    assert (found["seeds"], found["test"], found["title"]) == ([2, 2], "paired", "A claim | with a bar")
    runs = sorted(path.name for path in (tmp_path / "runs" / "my").glob("*-s?"))
    assert runs == ["a-s1", "a-s2", "b-s1", "b-s2"]
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("model.safetensors")}
    again = claim(tmp_path, "a.toml", "--table", "claims.md")
    assert again.returncode == 0, again.stderr
    assert "4 of 4 runs are done already" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert found["answer"] in again.stdout
    assert again.stderr.splitlines()[-1] == "next: asgo compare runs/my"
    table = (tmp_path / "claims.md").read_text()
    assert "A claim \\| with a bar" in table
    assert found["answer"] in table


def test_claims_until_certain_about_one_sweep_are_answered_together(token_folder: Path, tmp_path: Path) -> None:
    """Though each would add seeds for its own pairs; here, all pairs are tested."""
    write_sweep(tmp_path / "my.toml", token_folder, *GOOD, seeds=[1, 2])
    write_claim(tmp_path / "a.toml", "my.toml", "a", until_certain=True, max_seeds=2)
    statement = {"contender": "b", "better_than": "a"}
    turned = {"sweep": "my.toml", "until_certain": True, "statement": statement}
    (tmp_path / "b.toml").write_text(tomli_w.dumps(turned))
    for _ in range(2):
        result = claim(tmp_path, "a.toml", "b.toml", "--json", "--slots", 2)
        assert result.returncode == 0, result.stderr
        found = json.loads(result.stdout)["claims"]
        assert [(each["seeds"], each["test"]) for each in found] == [([2, 2], "sequential")] * 2
    assert json.loads((tmp_path / "runs/my/until-certain.json").read_text())["against"] is None
    write_claim(tmp_path / "c.toml", "my.toml", "a", until_certain=True, max_seeds=3)
    result = claim(tmp_path, "a.toml", "c.toml")
    assert (result.returncode, result.stdout) == (2, "")
    assert "max_seeds: the claims about" in result.stderr
    assert "have 2 and 3; choose one number" in result.stderr


def test_a_contender_that_diverges_or_is_not_there(token_folder: Path, tmp_path: Path) -> None:
    write_sweep(tmp_path / "my.toml", token_folder, GOOD[1], DIVERGING, seeds=[1])
    write_claim(tmp_path / "wild.toml", "my.toml", "wild")
    for trained in ("2 of 2", "already"):
        result = claim(tmp_path, "wild.toml", "--json")
        assert result.returncode == 0, result.stderr
        (found,) = json.loads(result.stdout)["claims"]
        assert (found["answer"], found["reason"]) == ("does not hold", "a run of wild diverged")
        assert trained in result.stderr
    write_claim(tmp_path / "none.toml", "my.toml", "none")
    result = claim(tmp_path, "none.toml")
    assert (result.returncode, result.stdout) == (2, "")
    assert "none.toml: none: no run of my.toml has this name; choose from b, wild" in result.stderr
    assert "Traceback" not in result.stderr


def test_all_claims_are_checked_before_the_first_run(token_folder: Path, tmp_path: Path) -> None:
    write_sweep(tmp_path / "my.toml", token_folder, *GOOD, seeds=[1, 2])
    write_claim(tmp_path / "a.toml", "my.toml", "a")
    write_claim(tmp_path / "none.toml", "my.toml", "none")
    write_claim(tmp_path / "images.toml", "my.toml", "a", metric="accuracy")
    for wrong, problem in (
        ("none.toml", "none.toml: none: no run of my.toml has this name"),
        ("images.toml", "images.toml: metric accuracy: the task gpt records no accuracy; choose loss"),
    ):
        result = claim(tmp_path, "a.toml", wrong)
        assert (result.returncode, result.stdout) == (2, "")
        assert problem in result.stderr
        assert not (tmp_path / "runs").exists()
