"""A real Slurm on this machine, of Debian's packages slurm-wlm and munge, as the current user."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

_CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
KillWait=20
ReturnToService=2
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=low Nodes=node1 Default=YES MaxTime=INFINITE PriorityTier=1
PartitionName=polite Nodes=node1 MaxTime=INFINITE PriorityTier=1 GraceTime=60
PartitionName=high Nodes=node1 MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
PartitionName=both Nodes=node1,node2 MaxTime=INFINITE PriorityTier=1
"""
_NODES = ("node1", "node2")
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "srun", "sinfo")
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin"
_WAIT_S = 20.0


@pytest.fixture(scope="module")
def real_slurm() -> Iterator[Path]:
    """Start Slurm and return its configuration file; skip the test where it does not start."""
    missing = [name for name in _PROGRAMS if shutil.which(name, path=_PATH) is None]
    if missing:
        pytest.skip(f"needs Slurm (apt install slurm-wlm munge): there is no {', '.join(missing)}")
    with tempfile.TemporaryDirectory(prefix="asgo-slurm-") as name:  # short, because it holds a socket
        folder = Path(name)
        configuration = _configure(folder)
        commands = [
            [
                *("munged", "--foreground", "--force", f"--key-file={folder}/key", f"--socket={folder}/munge.socket"),
                *(f"--pid-file={folder}/pid", f"--log-file={folder}/log", f"--seed-file={folder}/seed"),
            ],
            ["slurmctld", "-D", "-c"],
            *(["slurmd", "-D", "-c", "-N", node] for node in _NODES),
        ]
        environment = {**os.environ, "PATH": _PATH, "SLURM_CONF": str(configuration)}
        with (folder / "output").open("wb") as output:
            daemons = [subprocess.Popen(command, env=environment, stdout=output, stderr=output) for command in commands]
            try:
                _wait_until_idle(environment, folder)
                yield configuration
            finally:
                subprocess.run(["scancel", f"--user={os.getuid()}"], env=environment, check=False)
                subprocess.run(["scancel", "--signal=KILL", f"--user={os.getuid()}"], env=environment, check=False)
                for daemon in reversed(daemons):
                    daemon.terminate()
                    daemon.wait(timeout=60)


def _configure(folder: Path) -> Path:
    (folder / "key").write_bytes(os.urandom(1024))
    (folder / "key").chmod(0o600)
    (folder / "state").mkdir()
    for node in _NODES:
        (folder / f"spool-{node}").mkdir()
    with contextlib.ExitStack() as held:
        servers = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        ports = [server.getsockname()[1] for server in servers]
    host, user = socket.gethostname().partition(".")[0], pwd.getpwuid(os.getuid()).pw_name
    configuration = folder / "slurm.conf"
    configuration.write_text(_CONFIGURATION.format(folder=folder, host=host, user=user, ports=ports))
    return configuration


def _wait_until_idle(environment: dict[str, str], folder: Path) -> None:
    deadline = time.monotonic() + _WAIT_S
    while time.monotonic() < deadline:
        words = ["sinfo", "--noheader", "--Node", "--format=%T"]
        state = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        if {*state.stdout.split()} == {"idle"}:
            return
        time.sleep(0.3)
    pytest.skip(f"Slurm does not start here: {(folder / 'output').read_text(errors='replace')[-300:]}")
