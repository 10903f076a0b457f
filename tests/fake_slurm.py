"""Stand-ins for Slurm's commands, which record their calls."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

_COMMANDS = {
    "sbatch": 'env > "$FAKE/environment"; . "$FAKE/answer"; echo 7',
    "squeue": 'case "$*" in *--jobs=*) cat "$FAKE/states";; *) cat "$FAKE/queue";; esac',
    "scontrol": 'if [ "$1" = show ]; then printf "n1\\nn2\\n"; fi',
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
}


@dataclass
class FakeSlurm:
    """A queue that a test writes, and the calls of the commands."""

    folder: Path

    def __setattr__(self, name: str, value: object) -> None:
        """Write what a command answers: `queue`, `states` (of one job), or `answer` (shell code of sbatch)."""
        if name != "folder":
            (self.folder / name).write_text(str(value))
        super().__setattr__(name, value)

    def calls(self, command: str) -> list[str]:
        """Return the arguments of each call but `scontrol show`."""
        lines = (self.folder / "calls").read_text().splitlines()
        found = [line.removeprefix(f"{command} ") for line in lines if line.startswith(f"{command} ")]
        return [line for line in found if not line.startswith("show ")]

    def environment(self) -> list[str]:
        """Return the environment of sbatch."""
        return (self.folder / "environment").read_text().splitlines()

    def execute(self, script: str, task: int | None, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a script as job 7, or as a task of the array 7."""
        array = {} if task is None else {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(task)}
        environment = {**os.environ, "SLURM_JOB_ID": "7" if task is None else "99", **array, **variables}
        path = self.folder / "script.sh"
        path.write_text(script)
        return subprocess.run(["bash", str(path)], env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def fake_slurm(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """Put stand-ins for Slurm's commands on the path."""
    folder = tmp_path_factory.mktemp("slurm")
    for name, body in _COMMANDS.items():
        path = folder / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >> "$FAKE/calls"\n{body}\n')
        path.chmod(0o755)
    (folder / "calls").touch()
    monkeypatch.setenv("FAKE", str(folder))
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    fake = FakeSlurm(folder)
    fake.queue, fake.states, fake.answer = "", "RUNNING", ""
    return fake
