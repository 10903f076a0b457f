"""Messages that cannot be written end nothing; data that cannot be written is an error."""

from __future__ import annotations

import errno
import os
import pty
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from asgo_cli import app as command_line
from tests.conftest import SMALL

SPEAK = """
import logging, sys, warnings
from asgo_cli import console
console.guard_streams()
for _ in range(3):
    console.say("a line")
    console.warn("another")
    warnings.warn("of a library")
    logging.warning("of its log")
print("done")
"""


def broken_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def full_disk() -> int:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    return os.open("/dev/full", os.O_WRONLY)


def closed_terminal() -> int:
    controller, terminal = pty.openpty()
    os.close(controller)
    return terminal


def asgo(*words: str, stdout: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "asgo_cli", *words]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("make", [broken_pipe, full_disk, closed_terminal])
def test_words_that_cannot_be_written_are_left_out(make) -> None:  # type: ignore[no-untyped-def]
    stderr = make()
    spoken = subprocess.run([sys.executable, "-c", SPEAK], stdout=subprocess.PIPE, stderr=stderr, text=True)
    os.close(stderr)
    assert (spoken.returncode, spoken.stdout) == (0, "done\n")


def test_words_that_can_be_written_are_all_there() -> None:
    spoken = subprocess.run([sys.executable, "-c", SPEAK], capture_output=True, text=True)
    assert spoken.stderr.count("a line\n") == spoken.stderr.count("warning: another\n") == 3
    assert spoken.stderr.count("of its log\n") == 3


def test_a_reader_of_data_that_left_ends_the_command_quietly() -> None:
    ended = asgo("train", "gpt", "--help", stdout=broken_pipe())
    assert (ended.returncode, ended.stderr) == (1, "")


def test_data_that_finds_a_full_disk_is_an_error() -> None:
    ended = asgo("train", "gpt", "--help", stdout=full_disk())
    assert (ended.returncode, ended.stderr) == (1, "error: stdout: No space left on device\n")


def test_closed_streams_are_not_taken_by_files_of_the_program(tmp_path: Path) -> None:
    """The first file that is opened would be stderr for whatever writes to it without Python."""
    program = "from asgo_cli import console; console.guard_streams(); print(open('file', 'w').fileno(), flush=True)"
    opened = subprocess.run(
        ["sh", "-c", 'exec "$0" -c "$1" <&- 2>&-', sys.executable, program],
        cwd=tmp_path, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )  # fmt: skip
    assert int(opened.stdout) > 2


def test_a_broken_pipe_to_something_else_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Such as one to a process that decodes images: it must not look like a reader of stdout that left."""

    def lose(*_: object, **__: object) -> None:
        reader, writer = os.pipe()
        os.close(reader)
        os.write(writer, b"work")

    monkeypatch.setattr("pipelines.generation.generate", lose)
    monkeypatch.setattr(sys, "argv", ["asgo", "generate", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    assert ended.value.code == 1
    assert "Broken pipe" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_disk_that_refuses_is_no_reason_to_start_again(number: int) -> None:
    """`--max-restarts` replaces processes that crashed; the disk would refuse those, too."""
    kind, code, message = command_line._describe(OSError(number, os.strerror(number), "runs/a/config.json"))
    assert (kind, code, message) == ("refused", 1, f"runs/a/config.json: {os.strerror(number)}")


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """Both ends of a terminal; the controller's is closed by the test."""
    controller, terminal = pty.openpty()
    yield controller, terminal
    os.close(terminal)


def test_a_closed_terminal_saves_the_run(terminal: tuple[int, int], token_folder: Path, tmp_path: Path) -> None:
    """The shell's SIGHUP comes with it, and from then on no line of the run can be written."""
    settings = {**SMALL, "training.steps": 1_000_000, "checkpoint.every": 1_000_000, "evaluation.every": 1_000_000}
    command = [
        sys.executable, "-m", "asgo_cli", "train", "gpt", "--preset=tiny", f"--data={token_folder}",
        f"--out={tmp_path / 'run'}", *(f"--set={key}={value}" for key, value in settings.items()),
    ]  # fmt: skip
    controller, stderr = terminal
    program = (
        "import fcntl, os, sys, termios; fcntl.ioctl(2, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", program, *command], stdout=stderr, stderr=stderr, start_new_session=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.is_file() and metrics.read_bytes().count(b"\n") > 5):
        assert run.poll() is None
        time.sleep(0.01)
    os.close(controller)
    assert run.wait() == 75
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1
