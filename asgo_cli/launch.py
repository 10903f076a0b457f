"""`asgo train ... --gpus N`: the processes to start, and the torchrun command that does the same."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.errors import UsageError
from pipelines.shell import command
from pipelines.training.launched import launched

LAUNCH_OPTIONS: dict[str, Any] = {
    "gpus": Annotated[int | None, typer.Option(min=1, metavar="N", help="Processes on this machine, one per GPU.")],
    "processes": Annotated[int | None, typer.Option(min=1, metavar="N", help="Processes on this machine, on its CPU.")],
    "nodes": Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Number of machines; give the same command on each.")
    ],
    "node_rank": Annotated[int | None, typer.Option(min=0, metavar="K", help="Rank of this machine, from 0.")],
    "rendezvous": Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Address of machine 0, and a free port there.")
    ],
    "max_restarts": Annotated[
        int,
        typer.Option(
            min=0, metavar="N", help="How often to restart from the newest checkpoint after a process is lost."
        ),
    ],
}
"""The options of a command that starts processes, by the fields of `Launch`."""
LAUNCH_FLAGS = {name: f"--{name.replace('_', '-')}" for name in LAUNCH_OPTIONS}


@dataclass(frozen=True)
class Launch:
    """The processes that a command asks for."""

    gpus: int | None = None
    processes: int | None = None
    nodes: int | None = None
    node_rank: int | None = None
    rendezvous: str | None = None
    max_restarts: int = 0

    def __bool__(self) -> bool:
        return self.gpus is not None or self.processes is not None

    @property
    def local_size(self) -> int:
        """Processes on this machine."""
        return self.gpus or self.processes or 1

    @property
    def size(self) -> int:
        """Processes on all machines."""
        return self.local_size * (self.nodes or 1)

    @property
    def device(self) -> str | None:
        """The device type of the processes; None without --gpus and --processes."""
        return "cuda" if self.gpus else "cpu" if self.processes else None

    @property
    def description(self) -> str:
        """How many processes, and where."""
        unit = "GPU" if self.gpus else "process"
        count = f"{self.local_size} {unit}{'' if self.local_size == 1 else 's' if self.gpus else 'es'}"
        return count if self.nodes is None else f"{count} on each of {self.nodes} machines"

    def check(self, device: str | None) -> None:
        """Raise `UsageError` if the options, or they and `--device`, contradict each other."""
        given = [flag for name, flag in LAUNCH_FLAGS.items() if getattr(self, name)]
        across = (self.nodes, self.node_rank, self.rendezvous)
        place = launched()
        if given and place is not None:
            started = "torchrun started this process already; leave it out"
            meant = "RANK and WORLD_SIZE are set, so another launcher started this process; unset them, or leave it out"
            raise UsageError(f"{given[0]}: {started if place.by_torchrun else meant}")
        if self.gpus and self.processes:
            raise UsageError("--gpus and --processes: give only one of them; --processes is for the CPU")
        if not self and (self.max_restarts or any(value is not None for value in across)):
            raise UsageError(
                f"{(given or ['--node-rank'])[0]}: give the number of processes per machine, too, with --gpus N"
            )
        if any(value is None for value in across) and any(value is not None for value in across):
            raise UsageError("--nodes, --node-rank and --rendezvous: give all three for several machines")
        if self.nodes is not None and self.node_rank is not None and self.node_rank >= self.nodes:
            raise UsageError(f"--node-rank {self.node_rank}: must be from 0 to {self.nodes - 1}")
        if self.rendezvous is not None:
            host_and_port(self.rendezvous)
        if self and device not in (None, "auto", self.device):
            option, other = ("--gpus", "--processes") if self.gpus else ("--processes", "--gpus")
            raise UsageError(f"--device {device}: {option} runs on {self.device}; use {other} for other devices")

    def check_machine(self) -> None:
        """Raise `UsageError` if there are fewer GPUs than processes."""
        if self.gpus is None:
            return
        import torch

        found = torch.cuda.device_count()
        if self.gpus > found:
            names = sorted({torch.cuda.get_device_name(index) for index in range(found)})
            there = f"{found} ({', '.join(names)})" if found else "none that torch can use"
            raise UsageError(f"--gpus {self.gpus}: this machine has {there}; --processes N needs none")


def host_and_port(rendezvous: str) -> tuple[str, int]:
    """Split HOST:PORT or [IPV6]:PORT. Raise `UsageError` for other texts."""
    host, _, port = rendezvous.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UsageError(f"--rendezvous {rendezvous}: must be HOST:PORT, such as node-1:29400")
    return host.strip("[]"), int(port)


def torchrun_arguments(launch: Launch, arguments: Sequence[str]) -> list[str]:
    """Return the arguments of torchrun for the arguments of this `asgo` command."""
    if launch.rendezvous is None:
        # Not --standalone: torchrun would listen on all interfaces and unpickle what it receives.
        place = ["--nnodes", "1", "--rdzv-backend", "c10d", "--rdzv-conf", "store_type=file"]
        place += ["--local-addr", "127.0.0.1"]
    else:
        # Torch's default is this machine's host name, which the other machines often cannot resolve.
        place = ["--nnodes", str(launch.nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", launch.rendezvous]
        place += ["--rdzv-id", "asgo", "--rdzv-conf", f"is_host={int(launch.node_rank == 0)}"]
        place += ["--local-addr", address_towards(launch.rendezvous, launch.node_rank == 0)]
    restarts = ["--max-restarts", str(launch.max_restarts)] if launch.max_restarts else []
    return [
        *place, "--nproc-per-node", str(launch.local_size), *restarts,
        "-m", "asgo_cli", *worker_arguments(launch, arguments),
    ]  # fmt: skip


def torchrun_command(launch: Launch, arguments: Sequence[str]) -> str:
    """Return the torchrun command as a line for a shell of this machine."""
    beside_python = Path(sys.executable).with_name("torchrun")
    found = shutil.which("torchrun")
    torchrun = "torchrun" if found and Path(found) == beside_python else str(beside_python)
    threads = [f"OMP_NUM_THREADS={threads_per_process(launch)}"] if "OMP_NUM_THREADS" not in os.environ else []
    return " ".join([*threads, command(torchrun, *torchrun_arguments(launch, arguments))])


def own_path() -> dict[str, str]:
    """Return variables that make `python -m asgo_cli` run this program, whatever the working directory contains."""
    root = Path(__file__).resolve().parents[1]
    if Path(sys.path[0]).resolve() != root:
        return {"PYTHONSAFEPATH": "1"}
    # asgo runs from a clone; PYTHONSAFEPATH keeps the working directory off the path, so name the clone.
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": path}


def worker_arguments(launch: Launch, arguments: Sequence[str]) -> list[str]:
    """Return the arguments without those of `Launch`, which are for the launcher."""
    return [*without_options(arguments, *LAUNCH_FLAGS.values()), "--device", str(launch.device)]


def without_options(arguments: Sequence[str], *with_value: str, without_value: Sequence[str] = ()) -> list[str]:
    """Return the arguments without these options and their values."""
    kept = []
    rest = iter(arguments)
    for argument in rest:
        if argument in with_value:
            next(rest)
        elif argument.partition("=")[0] not in (*with_value, *without_value):
            kept.append(argument)
    return kept


def threads_per_process(launch: Launch) -> int:
    """Return the number of threads of a process: its part of the cores of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // launch.local_size)


def address_towards(rendezvous: str, is_host: bool) -> str:
    """Return this machine's address for the others: that of the interface with the route to the rendezvous.

    Raises `UsageError` if the name of the rendezvous is unknown, or there is no route.
    """
    host, port = host_and_port(rendezvous)
    if is_host:
        return host
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # on a datagram socket: looks up the route and sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise UsageError(f"--rendezvous {rendezvous}: {error.strerror or error}") from error
