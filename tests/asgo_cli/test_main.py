"""The program as a process: Ctrl-C while it loads, foreign packages, locales that are not UTF-8."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.stopping import INTERRUPTED_LINE

ROOT = Path(__file__).parents[2]
CTRL_C = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"


def run(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m asgo_cli` in a folder."""
    path = os.pathsep.join([environment.pop("PYTHONPATH", ""), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-m", "asgo_cli", *arguments],
        cwd=folder, env={**os.environ, **environment, "PYTHONPATH": path}, capture_output=True, text=True,
        encoding="latin-1",
    )  # fmt: skip


def test_ctrl_c_while_torch_is_imported_is_one_line_and_exit_code_130(tmp_path: Path) -> None:
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "torch.py").write_text(CTRL_C)
    result = run("train", "gpt", "--preset", "tiny", folder=tmp_path, PYTHONPATH=str(tmp_path / "path"))
    assert (result.returncode, result.stderr) == (130, f"{INTERRUPTED_LINE}\n")


@pytest.mark.parametrize(
    "work",
    [
        "os.kill(os.getpid(), signal.SIGINT)",
        "try: os.kill(os.getpid(), signal.SIGINT)\n    except KeyboardInterrupt: raise RuntimeError('of a library')",
        "Collected()",
        "try: os.kill(os.getpid(), signal.SIGINT)\n    except: os.kill(os.getpid(), signal.SIGINT)",
    ],
    ids=["raises", "becomes another error", "comes in a destructor", "comes twice"],
)
def test_ctrl_c_in_a_command_is_one_line_and_exit_code_130(work: str) -> None:
    script = f"""
import os, signal, sys
from asgo_cli import app
from asgo_cli.__main__ import main

class Collected:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)

@app.app.command()
def work():
    {work}

sys.argv = ["asgo", "work"]
main()
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (130, f"{INTERRUPTED_LINE}\n")


def test_our_packages_come_before_those_of_a_project(tmp_path: Path) -> None:
    ours = ("asgo_cli", "models", "optim", "pipelines")
    for name in ours[1:]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    script = f"""if True:
        import asgo_cli, sys
        from importlib.util import find_spec
        print(*(find_spec(name).origin for name in {ours}), *sys.path)
    """
    environment = {**os.environ, "PYTHONPATH": f".{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    found = done.stdout.split()
    assert found[:4] == [str(ROOT / name / "__init__.py") for name in ours]
    assert str(tmp_path) in [str((tmp_path / place).resolve()) for place in found[4:]], "their other packages are found"


def test_what_stdout_cannot_encode_is_shown_by_its_number(tmp_path: Path) -> None:
    shown = run("train", "gpt", "--print-config", "--data", "Füße →", folder=tmp_path, PYTHONIOENCODING="latin-1")
    assert shown.returncode == 0, shown.stderr
    assert 'folder = "Füße \\u2192"' in shown.stdout


def test_a_process_that_other_launchers_started_says_where_the_processes_meet(tmp_path: Path) -> None:
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    result = run("train", "gpt", "--preset", "tny", folder=tmp_path, **variables)
    place = f"process 0 of 2 ({socket.gethostname()})"
    first, second = result.stderr.splitlines()
    assert first == f"{place}, from RANK and WORLD_SIZE; rendezvous at 127.0.0.1:29500"
    assert second.startswith(f"error: {place}: --preset: unknown preset 'tny'")
