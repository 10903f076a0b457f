"""The real command, its processes killed for real, ends with the bytes of an undisturbed run."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.long import long

from .mirrors import contents, make_texts, write_mirror

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")

ENTRY = [sys.executable, "-m", "asgo_cli"]
# Many shards, because a journal is written whenever one is complete. One tokenizer for the sake of one core.
OPTIONS = ["--shards=400", "--shard-tokens=2000", "--workers=1"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "1000"}


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 900,000 tokens in three files, of which every document has some."""
    files = [[f"x {text}" for text in make_texts(seed, count)] for seed, count in ((3, 5000), (4, 700), (5, 6300))]
    return write_mirror(tmp_path_factory.mktemp("mirror") / "parquet", files, "parquet")


@dataclass
class Run:
    """A run of the command in a session of its own, so that its processes are found."""

    process: subprocess.Popen[str]
    out: Path

    def processes(self) -> list[int]:
        """All of them that live."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                fields = stat.read_text().rpartition(")")[2].split()
                if int(fields[3]) == self.process.pid and fields[0] not in "ZX":
                    found.append(int(stat.parent.name))
        return found

    def workers(self) -> list[int]:
        """The tokenizer and the reader, in the order of their beginning."""
        return sorted(pid for pid in self.processes() if "spawn_main" in command_line(pid))

    def wait_for(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        """Raise if it does not come true, or the command ends before."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.end()
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def wait_until_writing(self) -> None:
        """Until a shard is complete."""
        before = len(list(self.out.glob("shard_*.bin")))
        self.wait_for(lambda: len(list(self.out.glob("shard_*.bin"))) > before)

    def end(self) -> tuple[int, list[str]]:
        """The exit code and what was said, without how far it was; all its processes are gone, or it fails."""
        words = self.process.communicate(timeout=60)[1]
        deadline = time.monotonic() + 60
        while self.processes():
            assert time.monotonic() < deadline, f"left over: {self.processes()}"
            time.sleep(0.01)
        return self.process.returncode, [line for line in words.splitlines() if not line.startswith("shard ")]


def command_line(pid: int) -> str:
    """What a process was started with; empty if it has gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except (FileNotFoundError, ProcessLookupError):
        return ""


Start = Callable[..., Run]


@pytest.fixture
def start(mirror: Path) -> Iterator[Start]:
    """Start `asgo data CORPUS` into a folder; nothing of it outlives the test."""
    runs: list[Run] = []

    def begin(corpus: str, out: Path, *options: str, entry: list[str] = ENTRY) -> Run:
        command = [*entry, "data", corpus, f"--source={mirror}", f"--out={out}", *OPTIONS, *options]
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
            start_new_session=True,
        )
        runs.append(Run(process, out))
        return runs[-1]

    yield begin
    for run in runs:
        for pid in run.processes():
            os.kill(pid, signal.SIGKILL)
        run.process.communicate()


@pytest.fixture(scope="module")
def done(mirror: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, bytes]]:
    """What an undisturbed run makes of a corpus."""

    @functools.cache
    def make(corpus: str) -> dict[str, bytes]:
        out = tmp_path_factory.mktemp("done") / corpus
        subprocess.run(
            [*ENTRY, "data", corpus, f"--source={mirror}", f"--out={out}", *OPTIONS], check=True, env=ENVIRONMENT
        )
        return contents(out)

    return make


Done = Callable[[str], dict[str, bytes]]


def finish(run: Run) -> dict[str, bytes]:
    """The files of a run that is let alone."""
    code, words = run.end()
    assert code == 0, words
    return contents(run.out)


def test_killed_at_random_moments_it_goes_on_to_the_same_bytes(start: Start, done: Done, tmp_path: Path) -> None:
    """The first one falls into the writing."""
    expected = done("fineweb")
    moments = random.Random()
    for number in range(3):
        run = start("fineweb", tmp_path / "out")
        if number == 0:  # later runs may find little left to write
            run.wait_until_writing()
        time.sleep(moments.uniform(0, 2 if number else 0.6))
        run.process.kill()
        code, words = run.end()
        assert code in (-signal.SIGKILL, 0), words  # it may have been done already
    assert finish(start("fineweb", tmp_path / "out")) == expected


# Begins the command and, before the nth operation of a kind on a file that matches, kills it.
KILLED_AT = """
import os, re, signal, sys
kind, file, left = sys.argv[1], sys.argv[2], int(sys.argv[3])
def watch(event, arguments):
    global left
    if event == kind and re.search(file, str(arguments)):
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
del sys.argv[1:4]
from asgo_cli.app import main
main()
"""


@long
def test_killed_between_one_file_and_the_next_it_goes_on_to_the_same_bytes(
    start: Start, done: Done, tmp_path: Path
) -> None:
    """Both writers of OpenWebText, in one folder, from its first journal to the last moment before it is complete."""
    out = tmp_path / "out"
    for kind, file, count in (
        ("os.rename", "unfinished.json", 1),  # the first journal
        ("os.rename", "unfinished.json", 3),  # shards have their names, and no journal knows of them
        ("os.truncate", "shard_", 2),  # going on: the validation shard is cut back, the training shard is not
        ("os.rename", "shard_000000", 1),  # all is written, and the validation shard is still hidden
        ("os.rename", "manifest.json", 1),
        ("os.remove", "/unfinished.json", 1),
    ):
        entry = [sys.executable, "-c", KILLED_AT, kind, file, str(count)]
        run = start("openwebtext", out, entry=entry)
        code, words = run.end()
        assert code == -signal.SIGKILL, (kind, file, words)
    assert {"manifest.json", "unfinished.json"} <= {path.name for path in out.iterdir()}
    assert finish(start("openwebtext", out)) == done("openwebtext")


def test_a_lost_tokenizer_ends_the_command_and_a_lost_reader_does_not(start: Start, done: Done, tmp_path: Path) -> None:
    run = start("fineweb", tmp_path / "out")
    run.wait_until_writing()
    tokenizer, _ = run.workers()
    os.kill(tokenizer, signal.SIGKILL)
    code, words = run.end()
    assert code == 1
    assert len(words) == 1
    assert re.search(
        r"a tokenizer process was killed \(.*\): [\d,]+ of 802,000 tokens are written; run the same", words[0]
    )
    run = start("fineweb", tmp_path / "out")
    run.wait_until_writing()
    _, reader = run.workers()
    os.kill(reader, signal.SIGKILL)
    code, words = run.end()
    assert code == 0, words
    assert "the reader process was killed" in words[0]
    assert "attempt 2 of 8 in 1 s" in words[0]
    assert contents(tmp_path / "out") == done("fineweb")


def test_a_tokenizer_killed_in_the_middle_of_its_answer_is_a_lost_one(start: Start, tmp_path: Path) -> None:
    """The answer is larger than what the system takes while nobody reads, because the command is stopped."""
    texts = [(text + " ") * 40 for text in make_texts(6, 3000)]
    mirror = write_mirror(tmp_path / "mirror", [texts], "parquet")
    run = start("fineweb", tmp_path / "out", f"--source={mirror}", "--shard-tokens=100000")
    run.wait_until_writing()
    os.kill(run.process.pid, signal.SIGSTOP)
    time.sleep(1)
    os.kill(run.workers()[0], signal.SIGKILL)
    time.sleep(0.1)
    os.kill(run.process.pid, signal.SIGCONT)
    code, words = run.end()
    assert code == 1
    assert "a tokenizer process was killed" in words[-1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_to_all_processes_is_an_interruption(number: signal.Signals, start: Start, tmp_path: Path) -> None:
    """Ctrl-C reaches the whole group, as do some schedulers' signals: here before the tokenizer can ignore it."""
    run = start("fineweb", tmp_path / "out")
    run.wait_for(lambda: len(run.workers()) == 2)
    os.killpg(run.process.pid, number)
    code, words = run.end()
    assert code == 75
    assert words[-1].startswith(f"stopped: {number.name}")
    assert "Traceback" not in "".join(words)


def test_who_began_with_overwrite_is_told_how_to_go_on_and_not_to_begin_again(start: Start, tmp_path: Path) -> None:
    run = start("fineweb", tmp_path / "out", "--overwrite")
    run.wait_until_writing()
    run.process.terminate()
    code, words = run.end()
    assert code == 75
    assert words[-2] == "to resume instead of starting again, omit --overwrite"


# A disk of memory, too small at first, that only the processes started here see.
SMALL_DISK = """
mount -t tmpfs -o size=500k tmpfs "$0" || exit 99
saved=$1; shift
"$@"; echo "exit code $?" >&2
mount -o remount,size=10m "$0"
"$@" && cp -r "$0/data" "$saved"
"""


def require_namespaces(*command: str) -> None:
    """Skip the test where a user may not run a command of their own namespaces."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", *command, "true"], capture_output=True).returncode:
        pytest.skip(f"unshare {' '.join(command)} is not allowed here")


def test_a_full_disk_ends_in_one_line_and_with_room_the_same_command_goes_on(
    start: Start, done: Done, tmp_path: Path
) -> None:
    require_namespaces("--map-root-user", "--mount")
    disk, saved = tmp_path / "disk", tmp_path / "saved"
    disk.mkdir()
    shell = ["unshare", "--map-root-user", "--mount", "sh", "-c", SMALL_DISK, str(disk), str(saved)]
    code, words = start("fineweb", disk / "data", entry=[*shell, *ENTRY]).end()
    if code == 99:
        pytest.skip("no tmpfs can be mounted here")
    assert words[1] == "exit code 1"
    full = r"error: .*/(shard_\d+\.bin|unfinished\.json): No space left on device; the written tokens are kept: "
    assert re.match(full, words[0])
    assert code == 0, words
    assert contents(saved) == done("fineweb")


def test_a_folder_that_may_not_be_made_is_named_in_one_line(start: Start, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    entry = ENTRY
    if os.geteuid() == 0:  # who is nobody in particular once the processes have a user of their own
        require_namespaces("--user", "--map-user=1000")
        entry = ["unshare", "--user", "--map-user=1000", *ENTRY]
    code, words = start("fineweb", tmp_path / "locked" / "out", entry=entry).end()
    assert (code, words) == (
        2,
        [f"error: {tmp_path}/locked/out: this folder cannot be created (Permission denied); choose another one"],
    )
