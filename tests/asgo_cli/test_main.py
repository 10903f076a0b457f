"""The program as a process: Ctrl-C while it loads, foreign packages, locales that are not UTF-8."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CTRL_C = """if True:
    import os, signal, time
    class Collected:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0)
    HOW
"""


def run(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m asgo_cli` in a folder."""
    path = os.pathsep.join([environment.pop("PYTHONPATH", ""), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-m", "asgo_cli", *arguments],
        cwd=folder, env={**os.environ, **environment, "PYTHONPATH": path}, capture_output=True, text=True,
        encoding="latin-1",
    )  # fmt: skip


@pytest.mark.parametrize(
    "how",
    [
        "os.kill(os.getpid(), signal.SIGINT)",
        "\n    try: os.kill(os.getpid(), signal.SIGINT)\n    except KeyboardInterrupt: raise ImportError('of a part')",
        "Collected(); os.kill(os.getpid(), signal.SIGINT)",
    ],
    ids=["raises", "becomes another error", "in a destructor, and again"],
)
def test_ctrl_c_while_torch_is_imported_is_one_line_and_exit_code_130(how: str, tmp_path: Path) -> None:
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "torch.py").write_text(CTRL_C.replace("HOW", how))
    result = run("train", "gpt", "--preset", "tiny", folder=tmp_path, PYTHONPATH=str(tmp_path / "path"))
    assert (result.returncode, result.stderr) == (130, "stopped: interrupted; what was not saved is lost\n")


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
