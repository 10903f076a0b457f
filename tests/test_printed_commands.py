"""Every command that is printed works when it is pasted into a shell, whatever the folders are called."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from asgo_cli import app as command_line
from pipelines.shell import command
from tests.conftest import SMALL

NAMES = (
    "a b", "it's", 'a"b', "[red]x", "a[1]", "a*b?", "$HOME", "$(touch pwned)", "`touch pwned`", "a;touch pwned",
    "-dash", "--help", "~x", "a\\", "a\\'b", "tab\tx", "two\nlines", "esc\x1b[31mred\x07", "bidi\u202ex", "ü 日本 🙂",
    ":smile:", "a{b}", "a#b", "a!b", "a\xa0b", os.fsdecode(b"latin\xe9 1"), "cut\x9f1",
)  # fmt: skip
WORST = 'it\'s [red]x[1] "$(touch pwned)" `touch pwned` :smile: tab\tesc\x1b[31m \\'

needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@needs_bash
def test_a_shell_reads_the_same_words(tmp_path: Path) -> None:
    line = command("printf", r"%s\0", *NAMES)
    assert line.isprintable(), "a terminal obeys nothing in it"
    result = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, check=True)
    assert [os.fsdecode(word) for word in result.stdout.split(b"\0")[:-1]] == list(NAMES)
    assert list(tmp_path.iterdir()) == []


def test_a_path_is_no_option_and_no_home_folder() -> None:
    assert command("asgo", "compare", Path("-dash"), Path("~x"), "-o") == "asgo compare ./-dash './~x' -o"


@needs_bash
def test_what_training_suggests_works_when_pasted(
    token_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("-x").mkdir()
    run = f"-x/{WORST}"
    settings = [f"--set={key}={value}" for key, value in SMALL.items()]
    words = ["train", "gpt", "--preset", "tiny", "--data", str(token_folder), "--out", run, *settings]
    monkeypatch.setattr(sys, "argv", ["asgo", *words])
    with pytest.raises(SystemExit, match="0"):
        command_line.main()
    said = capsys.readouterr().err.splitlines()
    first = next(number for number, line in enumerate(said) if line.startswith("next: "))
    commands = [line[len("next: ") :] for line in said[first:]]
    assert [line.split()[1] for line in commands] == ["export-metrics", "generate"]
    program = f'asgo() {{ {command(sys.executable, "-m", "asgo_cli")} "$@"; }}'
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    script = "\n".join(["set -e", program, *commands]).replace("TEXT", "the")
    result = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("the")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["-x", f"{WORST}.csv"]
