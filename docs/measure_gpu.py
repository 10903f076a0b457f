"""Measures asgo on the GPU of this machine: the tests that need one, a step of each optimizer, whole training steps.

make gpu        # about 20 minutes; writes docs/results/costs/DEVICE.md, one table to paste into a report
"""

import datetime
import json
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

COSTS = Path(__file__).parent / "results" / "costs"
MODELS = ("gpt2", "asro-gpt", "nanogpt")
COLUMNS = ("", "tokens/s", "step, ms", "time, × PyTorch", "MFU, %", "peak, GB")


def main() -> int:
    """Measure and write the page; returns the exit code."""
    if not torch.cuda.is_available():
        print("error: make gpu needs a CUDA device; torch finds none on this machine", file=sys.stderr)  # noqa: T201
        return 2
    device = torch.cuda.get_device_name()
    tests_work, tests = run_tests()
    reports = {
        f"asgo bench {' '.join(words)}": bench(*words)
        for words in (("optimizers", "--model", "gpt2"), *(("train", "--model", model) for model in MODELS))
    }
    path = COSTS / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.md"
    path.write_text(page(device, tests, reports), encoding="utf-8")
    print(f"{path.read_text(encoding='utf-8')}\n{path}")  # noqa: T201
    return 0 if tests_work and all(reports.values()) else 1


def run_tests() -> tuple[bool, str]:
    """Run the tests marked `gpu`; returns whether all passed, and pytest's summary."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider"]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    print(result.stdout)  # noqa: T201
    return result.returncode == 0, result.stdout.strip().splitlines()[-1].strip("= ")


def bench(*words: str) -> dict[str, Any] | None:
    """Return the report of `asgo bench`, whose messages are shown; None if it failed."""
    command = [sys.executable, "-m", "asgo_cli", "bench", *words, "--json"]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    return json.loads(result.stdout) if result.returncode == 0 else None


def page(device: str, tests: str, reports: dict[str, dict[str, Any] | None]) -> str:
    """Return the page for the reports by command."""
    lines = [
        f"# {device}",
        "",
        f"By `make gpu`, {datetime.date.today()}: commit {commit()}, torch {torch.__version__}, "
        f"Python {platform.python_version()}. Tests that need a GPU: {tests}.",
        "",
        "× PyTorch: for an optimizer, the time of its step relative to PyTorch's fused AdamW; for training, relative",
        "to the same model in a plain PyTorch loop. MFU: model FLOP utilization.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "| --- |" + " ---: |" * (len(COLUMNS) - 1),
    ]
    for command, report in reports.items():
        lines.append(f"| **`{command}`** |" + " |" * (len(COLUMNS) - 1))
        if report is None:
            lines.append("| failed |" + " |" * (len(COLUMNS) - 1))
        else:
            lines += rows(report)
    return "\n".join(lines) + "\n"


def rows(report: dict[str, Any]) -> list[str]:
    """Return the lines of the table for a report of `asgo bench optimizers` or `asgo bench train`."""
    lines = []
    for each in report.get("optimizers") or report["candidates"]:
        if each["failed"]:
            lines.append(f"| {each['name']}: {each['failed']} |" + " |" * (len(COLUMNS) - 1))
            continue
        speed, peak = each.get("speed"), each.get("peak_bytes") or each.get("step_peak_bytes")
        figures = (
            figure(each.get("tokens_per_s")),
            figure(each["median_ms"]),
            figure(1 / speed if speed else each.get("ratio_to_baseline")),
            figure(each.get("utilization"), 100),
            figure(peak, 1e-9),
        )
        lines.append("| " + " | ".join((each["name"], *figures)) + " |")
    return lines


def figure(value: float | None, factor: float = 1.0) -> str:
    """Return a number with three digits, or nothing."""
    if value is None:
        return ""
    scaled = value * factor
    return f"{scaled:,.0f}" if abs(scaled) >= 100 else f"{scaled:.3g}"


def commit() -> str:
    """Return the commit that is checked out, and whether files were changed since."""
    command = ["git", "describe", "--always", "--dirty", "--match="]
    result = subprocess.run(command, cwd=COSTS, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
