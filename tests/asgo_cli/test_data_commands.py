import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from asgo_cli import console, data
from pipelines.data.verify import verify
from pipelines.errors import UsageError


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog.\n" * 400)
    return path


def asgo_data(*arguments: object) -> Result:
    return CliRunner().invoke(data.app, [str(argument) for argument in arguments])


def test_text_makes_a_folder_and_says_how_to_train_on_it(text: Path, tmp_path: Path):
    out = tmp_path / "my data"
    result = asgo_data("text", text, "--tokenizer", "bytes", "--val-fraction", "0.1", "--out", out)
    assert result.exit_code == 0, result.output
    assert f"next: asgo train gpt --preset tiny --data '{out}'" in result.stderr
    assert "16,201" in result.stdout  # 0.9 of 18,000 bytes and one end-of-text
    assert [shard.tokens for shard in verify(out)] == [1801, 16201]


def test_text_has_the_documented_defaults_and_options(text: Path, tmp_path: Path):
    out = tmp_path / "out"
    assert asgo_data("text", text, "--out", out).exit_code == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["tokenizer"] == {"name": "gpt2"}
    assert manifest["shards"][0]["tokens"] < 10
    refused = asgo_data("text", text, "--out", out)
    assert isinstance(refused.exception, UsageError)
    options = ["--tokenizer", "chars", "--shard-tokens", "5000", "--overwrite"]
    assert asgo_data("text", text, *options, "--out", out).exit_code == 0
    assert [shard.tokens for shard in verify(out)][1:] == [5000, 5000, 5000, 2992]


def test_shakespeare_takes_a_file_and_has_its_own_folder(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    result = asgo_data("shakespeare", "--input", text)
    assert result.exit_code == 0, result.output
    assert "next: asgo train gpt --preset asgo-nanogpt --data data/shakespeare_char" in result.stderr
    assert [shard.tokens for shard in verify(Path("data/shakespeare_char"))] == [1801, 16201]


def test_empty_documents_are_counted_aloud(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": "some text"}\n{"text": " "}\n')
    result = asgo_data("text", tmp_path / "a.jsonl", "--val-fraction", "0.5", "--out", tmp_path / "out")
    assert "of 3 documents 2 empty and skipped" in result.stderr


@pytest.mark.parametrize("arguments", [["text", "--out", "x"], ["text", "a", "--tokenizer", "words", "--out", "x"]])
def test_wrong_usage_exits_with_2(arguments: list[str]):
    assert asgo_data(*arguments).exit_code == 2


def test_bare_data_shows_its_help():
    result = asgo_data()
    assert result.exit_code == 0
    for name in ("text", "shakespeare", "verify"):
        assert name in result.stdout


def test_the_commands_are_there_without_the_heavy_libraries():
    heavy = ("torch", "numpy", "pydantic", "matplotlib", "pyarrow", "tiktoken", "pipelines.data.text_to_shards")
    code = f"import sys, asgo_cli.data; sys.exit(', '.join(name for name in {heavy} if name in sys.modules) or None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_long_run_says_now_and_then_how_far_it_is(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0.0)
    result = asgo_data("text", text, "--val-fraction", "0.1", "--out", tmp_path / "out")
    assert "writing: 18,000 of 18,000 characters" in result.stderr


def test_a_kill_leaves_no_folder_and_the_next_run_succeeds(tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word{number * 7919 % 100_003}" for number in range(300_000)))
    arguments = ["text", str(text), "--out", str(tmp_path / "out")]
    command = [sys.executable, "-c", "from asgo_cli.data import app; app()", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: (tmp_path / ".out.partial").exists(), process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert asgo_data(*arguments).exit_code == 0
    assert all(shard.problem is None for shard in verify(tmp_path / "out"))
    assert names_in(tmp_path) == ["out", "text.txt"]


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert process.poll() is None, "the command ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
