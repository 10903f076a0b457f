"""Measures `asgo data fineweb` on this machine: what kills do to its result, and how much memory it takes.

The source is a mirror of Parquet files with the standard library's sources, the same file under as many names as are
needed. gigatoken is used where it is installed; to measure tiktoken, run this in an environment without it.
"""

import argparse
import collections
import contextlib
import filecmp
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow
from pyarrow import parquet

HEADER_BYTES, TOKEN_BYTES = 1024, 2
BYTES_OF_TEXT_A_TOKEN = 5  # fewer in truth, so that the mirror is never too short
LIBRARIES = {"tiktoken": "tokenizer", "xxhash": "reader"}  # loaded by these processes alone


def say(*words: object) -> None:
    """A line at once, into a file too."""
    print(*words, flush=True)  # noqa: T201


def make_mirror(folder: Path, tokens: int) -> Path:
    """Parquet files with at least so many tokens."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    texts = [path.read_text("utf-8", errors="replace") for path in paths if path.stat().st_size]
    folder.mkdir(parents=True, exist_ok=True)
    first = folder / "00000.parquet"
    parquet.write_table(pyarrow.table({"text": texts}), first, row_group_size=1000)
    for number in range(1, 1 + tokens * BYTES_OF_TEXT_A_TOKEN // sum(map(len, texts))):
        (folder / f"{number:05}.parquet").unlink(missing_ok=True)
        (folder / f"{number:05}.parquet").hardlink_to(first)
    return folder


class Run:
    """The command in a session of its own, in which its processes are found."""

    def __init__(self, options: argparse.Namespace, mirror: Path, out: Path) -> None:
        sizes = (f"--shards={options.shards}", f"--shard-tokens={options.shard_tokens}", f"--workers={options.workers}")
        command = [sys.executable, "-m", "asgo_cli", "data", "fineweb", f"--source={mirror}", f"--out={out}", *sizes]
        self.out, self.log = out, out.with_name(f"{out.name}.log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def kinds(self) -> Iterator[tuple[int, str]]:
        """Number and kind of every process that lives."""
        for path in Path("/proc").glob("[0-9]*"):
            try:
                state, _, _, session = (path / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(session) == self.process.pid and state not in "ZX":
                    yield int(path.name), self._kind(path)
            except (FileNotFoundError, ProcessLookupError):
                continue

    def _kind(self, path: Path) -> str:
        if int(path.name) == self.process.pid:
            return "command"
        if "spawn_main" not in (path / "cmdline").read_text():
            return "tracker"
        maps = (path / "maps").read_text()
        return next((kind for library, kind in LIBRARIES.items() if library in maps), "starting")

    def tokens(self) -> int:
        """Tokens in files, whether the journal knows of them or not."""
        files = [path.stat().st_size for path in self.out.glob("*shard_*")] if self.out.exists() else []
        return sum(max(0, size - HEADER_BYTES) // TOKEN_BYTES for size in files)


def measure_kills(options: argparse.Namespace, mirror: Path) -> bool:
    """Kill a process at a random moment, go on, and so again; after a complete folder comes a new one."""
    undisturbed = Run(options, mirror, options.folder / "undisturbed")
    if undisturbed.process.wait():
        sys.exit(undisturbed.log.read_text())
    run = Run(options, mirror, options.folder / "killed")
    folders, number, bad = 1, 0, list[str]()
    while number < options.count:
        if ended_before(run, pause := random.uniform(0, options.longest)):
            if run.process.returncode == 0:
                folders, bad = folders + 1, bad + differences(run, undisturbed)
                shutil.rmtree(run.out)
            run = Run(options, mirror, run.out)
        elif alive := [(pid, kind) for pid, kind in run.kinds() if kind != "tracker"]:  # else it has just ended
            number, killed = number + 1, random.choice(alive)
            say(f"{number:3}: {killed[1]:9} after {pause:4.1f} s, {run.tokens():,} tokens in files")
            bad += kill(run, *killed)
    if run.process.wait() != 0:
        run = Run(options, mirror, run.out)
        run.process.wait()
    bad += differences(run, undisturbed)
    say(f"{options.count} kills, {folders} folders complete:", *(bad or ["every byte is that of an undisturbed run"]))
    return not bad


def ended_before(run: Run, pause: float) -> bool:
    """Wait for the next kill, mostly that long after the writing has begun. True if the command has ended before."""
    tokens, in_the_opening = run.tokens(), random.random() < 0.2
    while not in_the_opening and run.tokens() <= tokens and run.process.poll() is None:
        time.sleep(0.02)
    with contextlib.suppress(subprocess.TimeoutExpired):
        run.process.wait(pause)
    return run.process.poll() is not None


def kill(run: Run, pid: int, kind: str) -> list[str]:
    """Kill a process, and say what should not have come of it."""
    os.kill(pid, signal.SIGKILL)
    if kind in ("reader", "starting"):  # survived, or as a tokenizer's loss; what follows shows which
        return []
    code = run.process.wait(timeout=60)
    deadline = time.monotonic() + 5  # who is still importing ends as soon as that is done
    while (left := [f"{kind} {pid} left over" for pid, kind in run.kinds()]) and time.monotonic() < deadline:
        time.sleep(0.05)
    expected = (0, 1 if kind == "tokenizer" else -signal.SIGKILL)  # 0: it was not needed any more
    return left + ([] if code in expected else [run.log.read_text()])


def differences(run: Run, undisturbed: Run) -> list[str]:
    """The names of files that differ, or are in one folder only."""
    names = sorted({path.name for folder in (run.out, undisturbed.out) for path in folder.iterdir()})
    _, different, absent = filecmp.cmpfiles(run.out, undisturbed.out, names, shallow=False)
    return different + absent


def measure_memory(options: argparse.Namespace, mirror: Path) -> bool:
    """The peaks of all processes together and of each kind, for every shard that is finished."""
    run = Run(options, mirror, options.folder / "memory")
    began, peaks, shards = time.monotonic(), collections.Counter[str](), 0
    highest = 0
    while run.process.poll() is None:
        now = collections.Counter[str]()
        for pid, kind in run.kinds():
            now[kind] += memory_of(pid)
        peaks |= now | collections.Counter(together=now.total())
        finished = len(list(run.out.glob("shard_*.bin")))
        if finished > shards:
            megabytes = ", ".join(f"{kind} {size / 1e6:,.0f}" for kind, size in sorted(peaks.items()))
            say(f"shard {finished:3} after {time.monotonic() - began:6.1f} s; peaks in MB: {megabytes}")
            highest, shards, peaks = max(highest, peaks["together"]), finished, collections.Counter()
        time.sleep(options.interval)
    seconds = time.monotonic() - began
    highest = max(highest, peaks["together"])
    rate = run.tokens() / seconds / 1e6
    say(f"peak {highest / 1e6:,.0f} MB; {run.tokens():,} tokens in {seconds:.1f} s, {rate:.2f} M tokens/s in all")
    say(run.log.read_text())
    return run.process.returncode == 0


def memory_of(pid: int) -> int:
    """Proportional set size in bytes, in which shared pages count once; resident size where that may not be read."""
    for file, name in (("smaps_rollup", "Pss"), ("status", "VmRSS")):
        try:
            found = re.search(rf"^{name}:\s+(\d+) kB", Path(f"/proc/{pid}/{file}").read_text(), re.MULTILINE)
        except (PermissionError, FileNotFoundError, ProcessLookupError):
            continue
        if found:
            return int(found[1]) * 1024
    return 0


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("part", choices=["kills", "memory"])
parser.add_argument("--count", type=int, default=25, help="kills: how many")
parser.add_argument("--longest", type=float, default=2, help="kills: seconds of writing until the next one")
parser.add_argument("--interval", type=float, default=0.2, help="memory: seconds between two samples")
parser.add_argument("--shards", type=int, default=80)
parser.add_argument("--shard-tokens", type=int, default=1_000_000)
parser.add_argument("--workers", type=int, default=os.cpu_count())
parser.add_argument("--folder", type=Path, default=Path("runs/measure_corpus"), help="for all files; emptied before")
options = parser.parse_args()
shutil.rmtree(options.folder, ignore_errors=True)
mirror = make_mirror(options.folder / "mirror", (options.shards + 1) * options.shard_tokens)
sys.exit(0 if {"kills": measure_kills, "memory": measure_memory}[options.part](options, mirror) else 1)
