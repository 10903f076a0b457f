"""`make gpu`: what it says without a GPU, and the page that it makes of reports."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "docs" / "measure_gpu.py"
TRAIN = ("train", "--model", "tiny", "--context", "16", "--batch-size", "4", "--repeats", "1", "--device", "cpu")
OPTIMIZERS = ("optimizers", "--model", "tiny", "--repeats", "1", "--device", "cpu", "--optimizer", "asgo")


def measuring() -> ModuleType:
    spec = importlib.util.spec_from_file_location("measure_gpu", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    result = subprocess.run([sys.executable, str(SCRIPT)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: make gpu needs a CUDA device; torch finds none on this machine\n"


def test_make_gpu_runs_the_script() -> None:
    command = ["make", "--dry-run", "--old-file=.venv/.dev", "gpu"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    # `make test` runs this too, and then `make` names its folder before and after.
    assert ".venv/bin/python docs/measure_gpu.py" in made.stdout.splitlines()


def test_the_page_has_a_row_an_optimizer_and_a_row_a_way_to_train(monkeypatch: pytest.MonkeyPatch) -> None:
    script = measuring()
    monkeypatch.chdir(ROOT)
    reports: dict[str, Any] = {
        "asgo bench optimizers": script.bench(*OPTIMIZERS),
        "asgo bench train": script.bench(*TRAIN, "--optimizer", "adamw", "--optimizer", "asgo"),
        "asgo bench train --model other": None,
    }
    as_on_a_gpu = json.loads(json.dumps(reports["asgo bench train"]))
    figures = {"utilization": 0.456, "peak_bytes": 12.3e9, "tokens_per_s": 1234567.8, "speed": 2.0}
    as_on_a_gpu["candidates"][1] |= figures
    as_on_a_gpu["candidates"][2] |= {"failed": "OutOfMemoryError: CUDA out of memory"}
    reports["as on a GPU"] = as_on_a_gpu
    text = script.page("NVIDIA H200", "41 passed in 9.1s", reports)
    table = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    assert {len(row) for row in table} == {len(script.COLUMNS)}
    names = [row[0] for row in table[2:]]
    training = ["plain PyTorch, AdamW", "adamw", "asgo"]
    assert names == [
        "**`asgo bench optimizers`**", "torch.AdamW:fused=true", "asgo",
        "**`asgo bench train`**", *training,
        "**`asgo bench train --model other`**", "failed",
        "**`as on a GPU`**", *training[:2], "asgo: OutOfMemoryError: CUDA out of memory",
    ]  # fmt: skip
    assert table[3][3] == "1"  # AdamW's time relative to itself
    assert table[-2][1:2] + table[-2][3:] == ["1,234,568", "0.5", "45.6", "12.3"]
    assert "41 passed in 9.1s" in text
