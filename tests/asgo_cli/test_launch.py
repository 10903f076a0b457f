"""`asgo train ... --processes N`: real launchers and real processes, started, signalled and killed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from asgo_cli.launch import Launch
from asgo_cli.worker import Outcome
from tests import forks
from tests.asgo_cli.test_train_commands import SETTINGS, asgo  # noqa: F401  (a fixture)
from tests.long import long
from tests.pipelines.training.processes import free_port

ROOT = Path(__file__).parents[2]
HOST = socket.gethostname()
PATIENCE_S = 60
_LISTENS = "0A"
_LOOPBACK = {"0100007F", "0" * 24 + "01000000"}

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "a", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29400",
}  # fmt: skip

WORKER = """
import os, signal, sys, time
from pathlib import Path
from asgo_cli import worker

rank, attempt, scenario = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"], sys.argv[1]
Path(f"begun-{rank}-{attempt}").write_text(f"{os.environ['MASTER_ADDR']} {os.environ['MASTER_PORT']}")
if scenario == "starts slowly":
    if rank == "0":
        os.kill(os.getppid(), signal.SIGINT)
    time.sleep(1)
worker.begin_worker()

def end(*words):
    worker.end_worker(*words)
    sys.exit(words[1])

def wait():
    time.sleep(100)

def wait_for(is_true):
    while not is_true():
        time.sleep(0.01)

def is_dead(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True

if scenario == "refused":
    end("refused", 1, "the disk is full") if rank == "1" else wait()
if scenario == "same everywhere":
    end("refused", 2, "no such folder")
if scenario == "killed" and attempt == "0":
    if rank == "0":
        wait_for(Path("deaf").exists)
        Path("doomed").write_text(str(os.getpid()))
        Path("doomed").rename("victim")
        os.kill(os.getpid(), signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, which would end this process without its word
    Path("deaf").touch()
    wait_for(Path("victim").exists)
    wait_for(lambda: is_dead(Path("victim").read_text()))
    end("consequence", 1, "lost the connection")
if scenario == "killed beside a deaf one":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if rank == "0":
        wait_for(Path("deaf").exists)
        os.kill(os.getpid(), signal.SIGKILL)
    worker.end_worker("consequence", 1, "lost the connection")
    Path("deaf").touch()
    wait()
if scenario == "hung":
    end("hung", 1, "no progress for 9 s: process 1 (b) is still at step 7")
if scenario == "without a word" and rank == "1":
    sys.exit(7)
if scenario == "stops":
    caught = []
    def note(number, frame):
        caught.append(signal.Signals(number).name)
        Path(f"caught-{rank}").write_text(" ".join(caught))
    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, note)
    Path(f"ready-{rank}").touch()
    needed = int(sys.argv[2])
    while len(caught) < needed:
        time.sleep(0.01)
    time.sleep(0.5)
    end("stopped", 75, caught[0] + ": saved")
if scenario == "starts slowly":
    Path(f"ready-{rank}").touch()
    wait()
if scenario == "ends slowly":
    if rank == "0":
        wait_for(Path("ready-1").exists)
        end("crashed", 1, "a bug")
    caught = []
    def note(number, frame):
        caught.append(signal.Signals(number).name)
        Path("caught-1").write_text(" ".join(caught))
    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, note)
    Path("ready-1").touch()
    wait_for(lambda: "SIGINT" in caught)
    end("consequence", 1, "lost the connection")
if scenario == "waits once" and attempt == "0":
    Path(f"ready-{rank}").touch()
    wait()
if scenario == "cannot be asked":
    Path(f"ready-{rank}").touch()
    wait()
"""


def run_launcher(scenario: str, asked: Launch, folder: Path, words: str, ignored: Sequence[signal.Signals]) -> None:
    """What `asgo` does once the options are read."""
    from asgo_cli.supervisor import supervise
    from pipelines.errors import AsgoError

    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    socket.getfqdn = None  # type: ignore[assignment]  # a name server that does not answer would be waited for
    os.chdir(folder)
    os.environ.update(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    descriptor = os.open(words, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 2)
    try:
        code = supervise(asked, [sys.executable, "worker.py", *shlex.split(scenario)])
    except AsgoError as error:
        print(error, file=sys.stderr, flush=True)  # noqa: T201
        code = error.exit_code
    os._exit(code)


class Launcher:
    """A launcher of light workers, in a process of its own."""

    def __init__(
        self, folder: Path, scenario: str, asked: Launch, name: str, ignored: Sequence[signal.Signals]
    ) -> None:
        self._words = folder / name
        self.process = forks.start(run_launcher, scenario, asked, folder, str(self._words), ignored)

    def end(self) -> tuple[int | None, str]:
        """Its exit code and what it said, at its end."""
        self.process.join(PATIENCE_S)
        return self.process.exitcode, self._words.read_text()


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launcher]]:
    """Start two workers in one of the scenarios; kill the launcher if it still lives."""
    started: list[Launcher] = []
    (tmp_path / "worker.py").write_text(WORKER)

    def start(
        scenario: str, *, name: str = "words", ignored: Sequence[signal.Signals] = (), **options: Any
    ) -> Launcher:
        started.append(Launcher(tmp_path, scenario, Launch(**{"processes": 2, **options}), name, ignored))
        return started[-1]

    yield start
    for launcher in started:
        launcher.process.kill()
        launcher.process.join()


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, paths
        time.sleep(0.01)


def test_workers_that_finish_leave_nothing_to_say(launch: Callable[..., Launcher]) -> None:
    assert launch("finishes").end() == (0, "")


def test_the_error_of_one_worker_is_shown_once_and_not_retried(launch: Callable[..., Launcher], tmp_path: Path) -> None:
    code, words = launch("refused", max_restarts=3).end()
    assert (code, words) == (1, f"error: process 1 of 2 ({HOST}): the disk is full\n")
    assert not (tmp_path / "begun-0-1").exists()


def test_what_is_wrong_in_every_worker_alike_names_none(launch: Callable[..., Launcher]) -> None:
    assert launch("'same everywhere'").end() == (2, "error: no such folder\n")


def test_a_hang_is_told_as_the_watchdog_puts_it(launch: Callable[..., Launcher]) -> None:
    assert launch("hung").end() == (1, "error: no progress for 9 s: process 1 (b) is still at step 7\n")


def test_a_killed_worker_is_named_with_its_signal_before_those_that_missed_it(launch: Callable[..., Launcher]) -> None:
    code, words = launch("killed").end()
    assert code == 1
    assert words == f"error: process 0 of 2 ({HOST}) was killed by SIGKILL, perhaps out of memory\n"


@long
def test_a_killed_worker_is_named_before_those_that_the_launcher_has_to_kill(launch: Callable[..., Launcher]) -> None:
    code, words = launch("'killed beside a deaf one'").end()
    assert code == 1
    assert words == f"error: process 0 of 2 ({HOST}) was killed by SIGKILL, perhaps out of memory\n"


def test_a_lost_worker_is_one_line_and_all_are_started_again(launch: Callable[..., Launcher], tmp_path: Path) -> None:
    code, words = launch("killed", max_restarts=2).end()
    assert code == 0
    assert words == (
        f"warning: a worker was lost (process 0 of 2 ({HOST}) was killed by SIGKILL, perhaps out of memory); "
        "restart 1 of 2 from the newest checkpoint\n"
    )
    assert (tmp_path / "begun-1-1").exists()


def test_a_worker_that_ends_without_a_word_is_named_with_its_exit_code(launch: Callable[..., Launcher]) -> None:
    code, words = launch("'without a word'").end()
    assert (code, words) == (1, f"error: process 1 of 2 ({HOST}) ended with exit code 7 without an error message\n")


@pytest.mark.parametrize(
    ("sent", "received"),
    [(signal.SIGINT, "SIGINT"), (signal.SIGHUP, "SIGTERM")],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_signal_reaches_every_worker_exactly_once(
    sent: signal.Signals, received: str, launch: Callable[..., Launcher], tmp_path: Path
) -> None:
    launcher = launch("stops 1")
    wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    assert launcher.process.pid is not None
    os.kill(launcher.process.pid, sent)
    assert launcher.end() == (75, f"stopped: {received}: saved\n")
    assert [(tmp_path / f"caught-{rank}").read_text() for rank in (0, 1)] == [received, received]


def test_a_closed_terminal_ends_nothing_under_nohup(launch: Callable[..., Launcher], tmp_path: Path) -> None:
    launcher = launch("stops 1", ignored=[signal.SIGHUP])
    wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    for number in (signal.SIGHUP, signal.SIGTERM):
        os.kill(int(launcher.process.pid or 0), number)
    assert launcher.end() == (75, "stopped: SIGTERM: saved\n")


def test_a_signal_while_the_processes_start_ends_all_of_them_without_a_traceback(
    launch: Callable[..., Launcher], tmp_path: Path
) -> None:
    code, words = launch("'starts slowly'", processes=3).end()
    assert code == 130
    assert re.fullmatch(rf"error: SIGINT: process \d of 3 \({HOST}\) was killed by SIGINT; what .* is lost\n", words)
    assert not list(tmp_path.glob("ready-*")), "one did not get the signal"


def test_a_signal_that_was_passed_on_to_workers_that_end_anyway_is_not_lost(
    launch: Callable[..., Launcher], tmp_path: Path
) -> None:
    launcher = launch("'ends slowly'", max_restarts=3)
    wait_for(tmp_path / "caught-1")
    os.kill(int(launcher.process.pid or 0), signal.SIGINT)
    assert launcher.end() == (1, f"error: process 0 of 2 ({HOST}): a bug\n")
    assert (tmp_path / "caught-1").read_text() == "SIGTERM SIGINT"
    assert not (tmp_path / "begun-0-1").exists()


def test_a_second_signal_reaches_the_workers_too(launch: Callable[..., Launcher], tmp_path: Path) -> None:
    launcher = launch("stops 2")
    wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    assert launcher.process.pid is not None
    os.kill(launcher.process.pid, signal.SIGINT)
    wait_for(tmp_path / "caught-0", tmp_path / "caught-1")
    os.kill(launcher.process.pid, signal.SIGINT)
    assert launcher.end() == (75, "stopped: SIGINT: saved\n")
    assert [(tmp_path / f"caught-{rank}").read_text() for rank in (0, 1)] == ["SIGINT SIGINT"] * 2


def test_a_signal_before_there_is_anything_to_save_is_told(launch: Callable[..., Launcher], tmp_path: Path) -> None:
    launcher = launch("'cannot be asked'")
    wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    assert launcher.process.pid is not None
    os.kill(launcher.process.pid, signal.SIGTERM)
    code, words = launcher.end()
    assert code == 128 + signal.SIGTERM
    assert words.startswith(f"error: SIGTERM: process 0 of 2 ({HOST}) was killed by SIGTERM; ")


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells a process of its parent's death on Linux alone")
def test_workers_of_a_killed_launcher_are_asked_to_stop(launch: Callable[..., Launcher], tmp_path: Path) -> None:
    launcher = launch("stops 1")
    wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    launcher.process.kill()
    wait_for(tmp_path / "caught-0", tmp_path / "caught-1")
    # The kernel may say it more than once: when the threads of the launcher die one after another.
    assert {*(tmp_path / "caught-1").read_text().split()} == {"SIGTERM"}


def machine(rank: int, port: int, processes: int = 1) -> dict[str, Any]:
    return {"processes": processes, "nodes": 2, "node_rank": rank, "rendezvous": f"127.0.0.1:{port}"}


def launch_both(launch: Callable[..., Launcher], scenario: str, port: int, **options: Any) -> list[Launcher]:
    return [launch(scenario, **machine(rank, port), name=f"words-{rank}", **options) for rank in (0, 1)]


def test_two_machines_meet_and_a_signal_to_one_is_all_it_takes_there(
    launch: Callable[..., Launcher], tmp_path: Path
) -> None:
    both = launch_both(launch, "stops 1", free_port())
    wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    assert (tmp_path / "begun-0-0").read_text() == (tmp_path / "begun-1-0").read_text()
    for launcher in both:
        assert launcher.process.pid is not None
        os.kill(launcher.process.pid, signal.SIGTERM)
    assert [launcher.end() for launcher in both] == [(75, "stopped: SIGTERM: saved\n")] * 2


def test_machines_with_different_numbers_of_processes_count_their_ranks(
    launch: Callable[..., Launcher], tmp_path: Path
) -> None:
    port = free_port()
    both = [launch("finishes", **machine(rank, port, 1 + rank), name=f"words-{rank}") for rank in (0, 1)]
    assert [launcher.end() for launcher in both] == [(0, "")] * 2
    assert {path.name for path in tmp_path.glob("begun-*")} == {"begun-0-0", "begun-1-0", "begun-2-0"}


@pytest.mark.parametrize("max_restarts", [0, 1])
def test_every_machine_tells_which_worker_was_lost_on_one_of_them(
    max_restarts: int, launch: Callable[..., Launcher], tmp_path: Path
) -> None:
    both = launch_both(launch, "killed", free_port(), max_restarts=max_restarts)
    lost = f"process 0 of 2 ({HOST}) was killed by SIGKILL, perhaps out of memory"
    restart = f"warning: a worker was lost ({lost}); restart 1 of 1 from the newest checkpoint\n"
    expected = (0, restart) if max_restarts else (1, f"error: {lost}\n")
    assert [launcher.end() for launcher in both] == [expected] * 2
    assert len(list(tmp_path.glob("begun-*-1"))) == 2 * max_restarts


def test_a_machine_that_is_started_again_takes_its_place_in_the_run(
    launch: Callable[..., Launcher], tmp_path: Path
) -> None:
    port = free_port()
    first, second = launch_both(launch, "'waits once'", port, max_restarts=1)
    wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    second.process.kill()
    again = launch("'waits once'", **machine(1, port), max_restarts=1, name="words-2")
    lost = f"process 1 of 2 ({HOST}): its launcher was lost, and started again"
    restart = f"warning: a worker was lost ({lost}); restart 1 of 1 from the newest checkpoint\n"
    assert [launcher.end() for launcher in (first, again)] == [(0, restart)] * 2


def test_two_machines_of_the_same_rank_are_one_line_on_the_second(
    launch: Callable[..., Launcher], tmp_path: Path
) -> None:
    port = free_port()
    both = launch_both(launch, "stops 1", port, max_restarts=1)
    wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    twice = launch("stops 1", **machine(1, port), name="words-2")
    assert twice.end() == (2, "--node-rank 1: another machine of this run has the same rank\n")
    for launcher in both:
        os.kill(int(launcher.process.pid or 0), signal.SIGTERM)
    assert [launcher.end() for launcher in both] == [(75, "stopped: SIGTERM: saved\n")] * 2


def test_without_the_launcher_of_machine_0_the_others_end(launch: Callable[..., Launcher], tmp_path: Path) -> None:
    port = free_port()
    first, second = launch_both(launch, "'waits once'", port, max_restarts=1)
    wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    first.process.kill()
    no_answer = f"127.0.0.1:{port}: no connection to machine 0; is it running, and is the port open?\n"
    assert second.end() == (1, no_answer)


def test_ctrl_c_on_one_machine_ends_all_that_wait_with_it(launch: Callable[..., Launcher], tmp_path: Path) -> None:
    port = free_port()
    asked = {"processes": 1, "nodes": 3, "rendezvous": f"127.0.0.1:{port}"}
    both = [launch("finishes", **asked, node_rank=rank, name=f"words-{rank}") for rank in (0, 1)]
    store = dist.TCPStore("127.0.0.1", port, timeout=timedelta(seconds=PATIENCE_S))
    dist.PrefixStore("launchers-of-3", store).wait(["0/ready/0", "0/ready/1"])
    os.kill(int(both[1].process.pid or 0), signal.SIGINT)
    expected = (130, "stopped: SIGINT before the processes were started\n")
    assert [launcher.end() for launcher in both] == [expected] * 2


def test_ctrl_c_while_another_machine_is_waited_for_is_one_line(launch: Callable[..., Launcher]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(PATIENCE_S)
        launcher = launch("finishes", **machine(1, silent.getsockname()[1]))
        connection, _ = silent.accept()
        os.kill(int(launcher.process.pid or 0), signal.SIGINT)
        code, words = launcher.end()
        connection.close()
    assert (code, words) == (130, "stopped: SIGINT before the processes were started\n")


def test_a_name_that_is_unknown_is_one_line_at_once(launch: Callable[..., Launcher]) -> None:
    asked = {**machine(1, 29400), "rendezvous": "nowhere.invalid:29400"}
    code, words = launch("finishes", **asked).end()
    assert (code, words.count("\n")) == (2, 1)
    assert words.startswith("--rendezvous nowhere.invalid:29400: ")


def test_a_port_that_is_taken_is_one_line(launch: Callable[..., Launcher]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, words = launch("finishes", **machine(0, port)).end()
    assert (code, words.count("\n")) == (1, 1)
    assert f"127.0.0.1:{port}: cannot listen there" in words


def test_the_earliest_outcome_that_is_no_consequence_comes_first() -> None:
    from asgo_cli.machines import first_of

    def outcome(kind: Any, rank: int, time: float) -> Outcome:
        return Outcome(kind, 1, "", rank, 3, "a", time)

    outcomes = [outcome("consequence", 0, 1.0), outcome("crashed", 1, 3.0), outcome("refused", 2, 2.0)]
    assert first_of(outcomes) == outcomes[2]
    assert first_of(outcomes[:1]) == outcomes[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--processes 2 --gpus 2", "--gpus and --processes: give only one of them"),
        ("--gpus 1000", "--gpus 1000: this machine has"),
        ("--max-restarts 2", "--max-restarts: give the number of processes per machine"),
        ("--node-rank 0", "--node-rank: give the number of processes per machine"),
        ("--processes 2 --nodes 2 --node-rank 0", "give all three for several machines"),
        ("--processes 2 --nodes 2 --node-rank 2 --rendezvous a:1", "--node-rank 2: must be from 0 to 1"),
        ("--processes 2 --nodes 2 --node-rank 1 --rendezvous a", "--rendezvous a: must be HOST:PORT"),
        ("--processes 2 --device cuda", "--device cuda: --processes runs on cpu"),
        ("--processes 2 --set runtime.device=cuda", "--device cuda: --processes runs on cpu"),
        ("--processes 0", "--processes"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_are_one_line(
    asgo,  # type: ignore[no-untyped-def]  # noqa: F811
    options: str,
    message: str,
) -> None:
    result = asgo("train", "gpt", "--preset", "tiny", *options.split())
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert message in result.err
    assert list(Path().iterdir()) == []


def test_a_process_of_torchrun_starts_no_others(asgo, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]  # noqa: F811
    for name, value in {**TORCHRUN, "TORCH_CPP_LOG_LEVEL": "ERROR"}.items():
        monkeypatch.setenv(name, value)
    result = asgo("train", "gpt", "--preset", "tiny", "--gpus", 2)
    assert result.code == 2
    assert f"process 0 of 2 ({HOST}): --gpus: torchrun started this process already" in result.err


def make_folders_of_our_names(place: Path, names: Sequence[str]) -> None:
    for name in names:
        (place / name).mkdir()
        (place / name / "__init__.py").write_text("raise ImportError('the wrong one')")


@long
def test_a_dry_run_prints_a_command_that_does_the_same_among_folders_of_our_names(
    asgo,  # type: ignore[no-untyped-def]  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    token_folder: Path,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    options = ["--processes", "1", "--max-restarts=2", "--dry-run", "--out", "my run"]
    result = asgo("train", "gpt", "--preset", "tiny", "--data", token_folder, *SETTINGS, *options)
    assert result.code == 0, result.err
    command = result.out.splitlines()[-1]
    assert command.startswith("OMP_NUM_THREADS=")
    place = ["--nnodes", "1", "--rdzv-backend", "c10d", "--rdzv-conf", "store_type=file", "--local-addr", "127.0.0.1"]
    assert shlex.split(command)[2:14] == [*place, "--nproc-per-node", "1", "--max-restarts", "2"]
    assert command.endswith("--out 'my run' --device cpu")
    make_folders_of_our_names(Path(), ("models", "optim", "pipelines"))  # Python itself would start the fourth
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(["bash", "-c", command], env=environment, check=True, capture_output=True)
    assert json.loads(Path("my run/metrics.jsonl").read_text().splitlines()[-1])["step"] == 6


def addresses_listened_on(pid: int) -> set[str]:
    """The local addresses of the sockets with which a process waits for connections, as `/proc/net` writes them."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            inodes.add(link.readlink().name.removeprefix("socket:[").removesuffix("]"))
    tables = [Path(f"/proc/{pid}/net/{name}").read_text() for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table.splitlines()]
    return {row[1].partition(":")[0] for row in rows if row[3] == _LISTENS and row[9] in inodes}


def worker_pids(launcher: subprocess.Popen[str]) -> dict[str, int]:
    """The workers of a launcher, by rank."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            if (folder / "stat").read_text().rpartition(")")[2].split()[1] == str(launcher.pid):
                environment = (folder / "environ").read_text().split("\0")
                found[dict(item.split("=", 1) for item in environment if "=" in item)["RANK"]] = int(folder.name)
        except (OSError, KeyError):
            continue
    return found


@long
@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")
def test_training_on_loopback_survives_the_loss_of_its_first_process_among_folders_of_our_names(
    token_folder: Path, tmp_path: Path
) -> None:
    make_folders_of_our_names(tmp_path, ("models", "optim", "pipelines", "asgo_cli"))
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from asgo_cli.app import main; main()"
    command = [sys.executable, "-P", "-c", program, "train", "gpt", "--preset", "tiny", "--data", str(token_folder)]
    options = [
        "--out",
        "run",
        "--set",
        "training.steps=100",
        "--set",
        "checkpoint.every=5",
        "--set",
        "evaluation.every=50",
    ]
    launch = ["--processes", "2", "--max-restarts", "1"]
    command += [*SETTINGS, *options, *launch]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as launcher:
        while not list(tmp_path.glob("run/checkpoints/step-*")):
            assert launcher.poll() is None
            time.sleep(0.02)
        workers = worker_pids(launcher)
        for pid in (launcher.pid, *workers.values()):  # the store is the launcher's, gloo's sockets are the workers'
            listened_on = addresses_listened_on(pid)
            assert listened_on, "there is nothing to look at"
            assert listened_on <= _LOOPBACK
        os.kill(workers["0"], signal.SIGKILL)
        _, words = launcher.communicate(timeout=2 * PATIENCE_S)
    assert launcher.returncode == 0, words
    lines = words.splitlines()
    (lost,) = [number for number, line in enumerate(lines) if line.startswith("warning: a worker was lost")]
    assert lines[lost + 1].startswith("resuming from run/checkpoints/step-")
    assert len([line for line in lines if line.startswith("done: ")]) == 1, "one process speaks"


def test_by_hand_every_process_tells_its_own_error(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [*torchrun, "-m", "asgo_cli", "train", "gpt", "--preset", "tny"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert re.search(rf"error: process [01] of 2 \({HOST}\): --preset: unknown preset 'tny'", result.stderr)
