"""`asgo doctor` through the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from asgo_cli import app


def asgo_doctor(monkeypatch: pytest.MonkeyPatch, folder: Path, *options: str) -> int:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["asgo", "doctor", *options])
    with pytest.raises(SystemExit) as stopped:
        app.main()
    return int(stopped.value.code or 0)


def test_json_holds_the_findings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert asgo_doctor(monkeypatch, tmp_path, "--json") == 0
    findings = {finding["what"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert findings["Python"]["found"] == sys.version.split()[0]
    assert findings["vocabulary"]["broken"] is False


def test_counts_the_warnings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("pipelines.doctor._TESTED_TORCH", ((1, 0), (1, 1)))
    assert asgo_doctor(monkeypatch, tmp_path) == 0
    shown = capsys.readouterr()
    assert shown.out.count("! ") == int(shown.err.split()[0]) >= 1
    assert "! not tested; from 1.0 to 1.1 is" in shown.out


def test_without_torch_the_table_is_whole_and_plain_and_the_exit_code_1(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    environment.pop("COLUMNS", None)
    result = subprocess.run(
        [sys.executable, "-m", "asgo_cli", "doctor"], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert result.stderr.strip() == "error: training cannot work here; fix first: torch"
    assert "libcudart.so.13" in result.stdout
    assert "free space" in result.stdout
    assert "\x1b" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
