"""What people see while the program works: in a log, in a pipe, on a terminal that is dumb, colourless, or resized."""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from asgo_cli import console
from asgo_cli.progress import PhaseProgress, TrainingProgress
from asgo_cli.sweep_progress import SweepProgress
from tests.conftest import SMALL
from tests.long import long

ROOT = Path(__file__).parents[2]
SETTINGS = [part for key, value in SMALL.items() for part in ("--set", f"{key}={value}")]
COLOUR = re.compile(rb"\x1b\[(\d+;)*3[0-7]m")


class Clock:
    """Time that passes when a test says so."""

    now_s = 1e6

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(console, "monotonic", clock)
    return clock


def row(step: int, split: str = "train") -> Any:
    return {"step": step, "split": split, "loss": 2.5, "lr": 1e-3, "throughput": 1e4}


def test_a_log_has_the_first_line_then_one_a_minute_and_the_last(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with TrainingProgress("asgo") as progress:
        progress.begin(0, 1000)
        progress.validated(row(0, "val"))
        for step in range(1, 1001):  # half a second each, validated every ten
            clock.now_s += 0.5
            progress.trained(row(step))
            if step % 10 == 0:
                progress.validated(row(step, "val"))
    lines = capsys.readouterr().err.splitlines()
    assert [int(re.findall(r"step (\d+)/1000", line)[0]) for line in lines] == [0, *range(120, 1000, 120), 1000]
    assert lines[1] == "asgo  step 120/1000  loss 2.5000  lr 1.00e-03  10,000 tok/s  val 2.5000"


def test_a_branch_at_the_step_before_the_last_has_one_line(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingProgress("asgo") as progress:
        progress.begin(5, 6)
        progress.trained(row(6))
        progress.validated(row(6, "val"))
    assert capsys.readouterr().err == "asgo  step 6/6  loss 2.5000  lr 1.00e-03  10,000 tok/s  val 2.5000\n"


def test_work_in_phases_has_one_line_a_minute(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    progress = PhaseProgress()
    with progress.bar:
        for phase in ("fetching", "unpacking"):
            for done in range(100):
                progress.show(phase, done, 100)
                clock.now_s += 1
    assert capsys.readouterr().err.splitlines() == [
        "fetching: 0.0%",
        "fetching: 60.0%",
        "unpacking: 20.0%",
        "unpacking: 80.0%",
    ]


def test_a_sweep_says_each_minute_where_its_runs_are(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    runs: list[Any] = [
        SimpleNamespace(
            step=0,
            run=SimpleNamespace(name=name, config=SimpleNamespace(task="gpt", training=SimpleNamespace(steps=90))),
        )
        for name in ("a", "b")
    ]
    with SweepProgress(2) as progress:
        for slot, run in enumerate(runs):
            progress.started(run, slot)
        for step in range(1, 91):
            for slot, run in enumerate(runs):
                progress.progressed(run, slot, row(step))
            clock.now_s += 1
        for slot, run in enumerate(runs):
            progress.ended(run, slot, "done")
    assert capsys.readouterr().err.splitlines()[2:] == [
        "a step 1/90, loss 2.5000",
        "a step 61/90, loss 2.5000; b step 60/90, loss 2.5000",
        "a: done",
        "b: done",
    ]


def asgo_environment(**variables: str) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    return {**plain, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}


@long
def test_the_log_of_two_processes_has_plain_whole_lines_of_one(token_folder: Path, tmp_path: Path) -> None:
    arguments = ["train", "gpt", "--preset", "tiny", "--data", str(token_folder), *SETTINGS, "--processes", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "asgo_cli", *arguments], env=asgo_environment(), cwd=tmp_path, capture_output=True
    )
    assert (done.returncode, done.stdout) == (0, b"")
    assert not set(b"\x1b\r") & set(done.stderr)
    lines = [line for line in done.stderr.decode().split("\n") if not re.search("step [1-5]/6  loss", line)]
    begins = (
        "accasro  step 0/6  val ",
        "accasro  step 6/6  loss ",
        "done: ",
        "next: asgo export",
        "      asgo gen",
        "",
    )
    assert all(line.startswith(begin) for line, begin in zip(lines, begins, strict=True)), lines


def on_terminal(folder: Path, arguments: list[str], **variables: str) -> bytes:
    """All that a command writes to a terminal, as the terminal gets it."""
    outer, inner = pty.openpty()
    command = [sys.executable, "-m", "asgo_cli", *arguments]
    environment = asgo_environment(**{"TERM": "xterm-256color", **variables})
    process = subprocess.Popen(command, stdin=inner, stdout=inner, stderr=inner, env=environment, cwd=folder)
    os.close(inner)
    written = b""
    try:
        while piece := os.read(outer, 65536):
            written += piece
    except OSError:  # Linux's way to say that the other end is closed
        pass
    process.wait()
    os.close(outer)
    return written


def test_colours_are_for_terminals_that_want_them(tmp_path: Path) -> None:
    wrong = ["viz", "nonesuch"]
    assert COLOUR.search(on_terminal(tmp_path, wrong))
    without = on_terminal(tmp_path, wrong, NO_COLOR="1")
    assert b"unknown function" in without
    assert not COLOUR.search(without)
    assert b"\x1b" not in on_terminal(tmp_path, wrong, TERM="dumb")


def test_a_dumb_terminal_gets_plain_lines_of_progress(token_folder: Path, tmp_path: Path) -> None:
    arguments = ["train", "gpt", "--preset", "tiny", "--data", str(token_folder), *SETTINGS]
    written = on_terminal(tmp_path, arguments, TERM="dumb")
    assert b"\x1b" not in written
    assert b"accasro  step 0/6  val " in written
    assert b"accasro  step 6/6  loss " in written


BARS = """
import os, sys, time
from rich.progress import BarColumn, TextColumn
from asgo_cli import console
from asgo_cli.live import LiveProgress
for number in range(30):  # as if the screen were full: tmux moves the cursor where it is not
    console.say(f"line {number}")
progress = LiveProgress("{task.description}", BarColumn(bar_width=None), "{task.fields[figures]}")
progress.live.auto_refresh = False  # a frame for each width that is read
with progress:
    bars = [progress.add_task(name, figures="") for name in ("asgo", "muon")]
    for frame, width in enumerate(sys.stdin):
        while os.get_terminal_size(2).columns != int(width):
            time.sleep(0.01)
        for bar in bars:
            progress.update(bar, figures=f"frame {frame}, and all that there is to say of it")
        progress.refresh()
"""


class Tmux:
    """A terminal that, like most, breaks its lines anew when its width changes."""

    def __init__(self, socket: Path) -> None:
        self._command = ["tmux", "-S", str(socket), "-f", "/dev/null"]

    def __call__(self, *arguments: str) -> str:
        done = subprocess.run(
            [*self._command, *arguments], env=asgo_environment(), check=True, capture_output=True, text=True
        )
        return done.stdout

    def lines(self) -> list[str]:
        """All that it shows and has shown."""
        return [line.rstrip() for line in self("capture-pane", "-p", "-S", "-").splitlines() if line.strip()]

    def wait_for(self, happened: Callable[[list[str]], bool]) -> list[str]:
        deadline = time.monotonic() + 60
        while not (lines := self.lines()) or not happened(lines):
            assert time.monotonic() < deadline, lines
            time.sleep(0.05)
        return lines


@pytest.fixture
def tmux(tmp_path: Path) -> Iterator[Tmux]:
    if shutil.which("tmux") is None:
        pytest.skip("needs tmux")
    # Not under `tmp_path`, which may be longer than the name of a socket can be.
    folder = tempfile.TemporaryDirectory(prefix="asgo-", dir="/tmp")
    tmux = Tmux(Path(folder.name) / "socket")
    (tmp_path / "bars.py").write_text(BARS)
    (tmp_path / "frames").touch()
    follow = f"tail -f {tmp_path}/frames | {sys.executable} {tmp_path}/bars.py; sleep 1000"
    tmux("new-session", "-d", "-x", "100", "-y", "24", follow)
    yield tmux
    tmux("kill-server")
    folder.cleanup()


def test_bars_on_a_terminal_that_is_resized_leave_nothing_behind(tmux: Tmux, tmp_path: Path) -> None:
    for frame, width in enumerate((100, 40, 100)):
        tmux("resize-window", "-x", str(width))
        with (tmp_path / "frames").open("a") as file:
            file.write(f"{width}\n")
        *before, asgo, muon = tmux.wait_for(lambda lines, frame=frame: f"frame {frame}" in lines[-1])
        assert before == [f"line {number}" for number in range(30)]
        assert asgo.startswith("a")
        assert muon.startswith("m")
        assert width / 2 < len(asgo) == len(muon) <= width
