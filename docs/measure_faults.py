"""Measures what faults do to training by several processes on this machine: kills, and machines that are cut off.

python docs/measure_faults.py kills --count 20      # random processes killed at random times, with restarts
python docs/measure_faults.py machines              # two machines, one of which loses its line (needs root)
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch

ASGO = [sys.executable, "-m", "asgo_cli"]
MACHINES = {"asgo-a": "10.77.0.1", "asgo-b": "10.77.0.2"}


def say(*words: object) -> None:
    """A line at once, into a file too."""
    print(*words, flush=True)  # noqa: T201


def train(data: Path, out: Path, options: argparse.Namespace, *more: str) -> list[str]:
    """The command of a small run, which saves every few steps."""
    return [
        *ASGO, "train", "gpt", "--preset=tiny", f"--data={data}", f"--out={out}", f"--optimizer={options.optimizer}",
        f"--steps={options.steps}", "--batch-size=4", "--set=checkpoint.every=10", "--set=evaluation.every=50",
        "--set=evaluation.batches=4", *more,
    ]  # fmt: skip


def last_tensors(run: Path) -> dict[str, torch.Tensor]:
    """Weights, optimizer state and random states of the last checkpoint."""
    folder = max((run / "checkpoints").glob("step-*"))
    files = [path for path in folder.glob("*.safetensors") if path.name != "history.safetensors"]
    return {f"{path.name}:{key}": value for path in files for key, value in safetensors.torch.load_file(path).items()}


def compare(run: Path, undisturbed: Path) -> None:
    """Say whether two runs ended alike; ends the script if not."""
    mine, its = last_tensors(run), last_tensors(undisturbed)
    same = mine.keys() == its.keys() and all(torch.equal(mine[name], its[name]) for name in mine)
    say(f"{len(mine)} tensors of weights, optimizer and random states: {'identical' if same else 'DIFFERENT'}")
    if not same:
        sys.exit(1)


def workers_of(out: Path) -> list[int]:
    """The training processes of a run, without their launcher."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_of_run = f"--out={out}" in (path / "cmdline").read_text().split("\0")
            if is_of_run and b"RANK=" in (path / "environ").read_bytes():
                found.append(int(path.name))
    return found


def kills(options: argparse.Namespace, root: Path, data: Path) -> None:
    """Kill random workers at random times, through starts, steps, validations and saves."""
    chance = random.Random(options.seed)
    subprocess.run(train(data, root / "undisturbed", options, "--processes=2"), check=True)
    run = root / "killed"
    command = train(data, run, options, "--processes=2", f"--max-restarts={options.count}")
    launcher = subprocess.Popen(command)
    done = 0
    while done < options.count and launcher.poll() is None:
        time.sleep(chance.uniform(0, options.longest))
        workers = workers_of(run)
        if len(workers) == 2:
            os.kill(chance.choice(workers), signal.SIGKILL)
            done += 1
            while set(workers) & set(workers_of(run)) and launcher.poll() is None:
                time.sleep(0.1)
    code = launcher.wait()
    say(f"{done} kills; the launcher ended with {code}")
    compare(run, root / "undisturbed")


@contextlib.contextmanager
def two_machines() -> Iterator[None]:
    """Two network namespaces with a line between them: to TCP, two machines."""
    first, second = MACHINES
    for name in MACHINES:
        subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        line = ["ip", "link", "add", "line", "netns", first, "type", "veth", "peer", "name", "line", "netns", second]
        subprocess.run(line, check=True)
        for name, address in MACHINES.items():
            inside = ["ip", "-n", name]
            subprocess.run([*inside, "addr", "add", f"{address}/24", "dev", "line"], check=True)
            subprocess.run([*inside, "link", "set", "line", "up"], check=True)
            subprocess.run([*inside, "link", "set", "lo", "up"], check=True)
        yield
    finally:
        for name in MACHINES:
            subprocess.run(["ip", "netns", "del", name], check=False)


def line_is(state: str) -> None:
    """Plug the second machine's line in or out."""
    subprocess.run(["ip", "-n", list(MACHINES)[1], "link", "set", "line", state], check=True)


def launch_both(data: Path, run: Path, options: argparse.Namespace) -> list[subprocess.Popen[bytes]]:
    """One process on each machine."""
    rendezvous = f"{next(iter(MACHINES.values()))}:29411"
    launchers = []
    for rank, name in enumerate(MACHINES):
        more = ["--processes=1", "--nodes=2", f"--node-rank={rank}", f"--rendezvous={rendezvous}", "--resume"]
        more.append(f"--set=runtime.timeout_s={options.timeout}")
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "line", "OMP_NUM_THREADS": "1"}
        command = ["ip", "netns", "exec", name, *train(data, run, options, *more)]
        launchers.append(subprocess.Popen(command, env=environment))
    return launchers


def wait_for_step(run: Path, step: int) -> None:
    """Until the run has recorded a step."""
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or f'"step": {step},' not in metrics.read_text():
        time.sleep(0.05)


def machines(options: argparse.Namespace, root: Path, data: Path) -> None:
    """Cut a line for a short time, then for long; bring it back; go on."""
    subprocess.run(train(data, root / "undisturbed", options, "--processes=2"), check=True)
    run = root / "cut"
    with two_machines():
        launchers = launch_both(data, run, options)
        wait_for_step(run, 15)
        line_is("down")
        say(f"the line is cut for {options.timeout / 4:g} s, less than the timeout of {options.timeout} s")
        time.sleep(options.timeout / 4)
        line_is("up")
        wait_for_step(run, 35)
        say("the run went on by itself")
        line_is("down")
        cut_at = time.monotonic()
        say("the line is cut for good")
        codes = [launcher.wait() for launcher in launchers]
        say(f"both launchers ended, with {codes}, {time.monotonic() - cut_at:.0f} s later")
        line_is("up")
        codes = [launcher.wait() for launcher in launch_both(data, run, options)]
        say(f"the same commands, with the line back, ended with {codes}")
    compare(run, root / "undisturbed")


def main() -> None:
    """Parse the options, make the data, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kills", "machines"])
    parser.add_argument("--count", type=int, default=20, help="kills")
    parser.add_argument("--longest", type=float, default=20, help="seconds from a start to the next kill, at most")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--optimizer", default="asgo")
    parser.add_argument("--timeout", type=int, default=20, help="seconds until a machine that is cut off is given up")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="asgo-faults-") as folder:
        root = Path(folder)
        source = Path(sysconfig.get_path("stdlib"), "argparse.py")
        text = [
            *ASGO,
            "data",
            "text",
            str(source),
            "--tokenizer=bytes",
            "--val-fraction=0.05",
            f"--out={root / 'data'}",
        ]
        subprocess.run(text, check=True)
        {"kills": kills, "machines": machines}[options.what](options, root, root / "data")


if __name__ == "__main__":
    main()
