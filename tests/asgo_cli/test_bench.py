"""`asgo bench` through the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from asgo_cli import app, console
from pipelines.benchmarks import float64_error, shapes
from pipelines.benchmarks.peers import BASELINE, PEER_LIBRARIES

Run = Callable[..., tuple[int, str, str]]

PARAMETERS = 2 * 16 * 24


class Chatty(torch.optim.SGD):
    """Prints when it steps."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        sys.stdout.write("hello from a peer\n")
        super().step(closure)


class Broken(torch.optim.SGD):
    """Cannot step."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise RuntimeError("[red]not today[/]")


@pytest.fixture
def asgo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs `asgo bench ...` on a small layer and with no peers installed; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shapes, "GPT2_LAYER", {"up": (24, 16), "down": (16, 24)})
    for key, shape in {"wide": (48, 64), "tall": (64, 48)}.items():
        monkeypatch.setitem(float64_error.SHAPES, key, shape)
    monkeypatch.setattr(console.data, "width", 120)
    for library in PEER_LIBRARIES:
        monkeypatch.setitem(sys.modules, library, None)
    for peer in (Chatty, Broken):
        monkeypatch.setattr(torch.optim, peer.__name__, peer, raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["asgo", "bench", *arguments])
        with pytest.raises(SystemExit) as stopped:
            app.main()
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return run


def options(*names: str) -> list[str]:
    return [part for name in names for part in ("--optimizer", name)]


def cells(out: str, name: str) -> list[str]:
    (line,) = [line for line in out.splitlines() if line.startswith(f"│ {name} ")]
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_the_command_is_imported_without_torch() -> None:
    heavy = "{'torch', 'numpy', 'pydantic'}"
    code = f"import sys, asgo_cli.bench; sys.exit(len({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_table_has_a_row_an_optimizer_with_the_exact_state(asgo: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optim.matrix_functions._bfloat16_wanted", False)  # as on a CPU with AVX2
    code, out, err = asgo("optimizers", *options("muon", "accasro", "torch.Muon"), "--repeats", "3", "--device", "cpu")
    assert code == 0
    header = [line for line in out.splitlines() if line.startswith("┃")]
    titles = [" ".join(map(str.strip, pair)) for pair in zip(*(line[1:-1].split("┃") for line in header), strict=True)]
    assert titles[1:] == ["step ms", "± %", "× AdamW", "× Muon", "first ms", "state bytes", " error", " n"]
    assert "gpt2-layer, 768 parameters; " in out
    baseline, muon, accasro, torchs = (cells(out, name) for name in (BASELINE, "muon", "accasro", "torch.Muon"))
    assert (baseline[3], torchs[4]) == ("1.00", "1.00")
    assert [row[-1] for row in (baseline, muon, accasro, torchs)] == ["3"] * 4
    assert [float(row[6]) for row in (baseline, muon, accasro)] == pytest.approx([8, 4, 17], abs=0.05)
    assert 0 < float(muon[-2]) < 3e-2
    assert "accasro: first step" in err
    assert "next: asgo bench optimizers --model gpt2 --optimizer muon --optimizer accasro --optimizer torch.Muon" in err
    assert "asgo bench optimizers --model gpt2-layer --optimizer muon" in err
    assert "--json > bench.json" in err


def test_without_torchs_muon_there_is_no_column_of_ratios_to_it(asgo: Run) -> None:
    code, out, _ = asgo("optimizers", *options("dasgo"), "--repeats", "2")
    assert code == 0
    assert "Muon" not in out
    assert len(cells(out, "dasgo")) == 8


def test_json_is_everything_on_stdout(asgo: Run) -> None:
    threads = torch.get_num_threads()
    code, out, err = asgo(
        "optimizers", *options("asgo:root_method=eigh", "torch.Chatty:lr=0.1"),
        "--repeats", "4", "--threads", "2", "--device", "cpu", "--budget", "50", "--json",
    )  # fmt: skip
    assert code == 0
    report = json.loads(out)
    rows = {row["name"]: row for row in report.pop("optimizers")}
    assert report == {
        "model": "gpt2-layer",
        "parameters": PARAMETERS,
        "shapes": [{"shape": [24, 16], "count": 1}, {"shape": [16, 24], "count": 1}],
        "device": report["device"],
        "device_type": "cpu",
        "threads": 2,
        "torch": torch.__version__,
        "libraries": {},
        "repeats": 4,
        "budget_s": 50.0,
        "baseline": BASELINE,
        "error_condition": 1e4,
        "error_steps": 5,
        "left_out": [],
    }
    assert report["device"].endswith("2 threads")
    assert torch.get_num_threads() == threads
    assert list(rows) == [BASELINE, "asgo:root_method=eigh", "torch.Chatty:lr=0.1"]
    row = rows["asgo:root_method=eigh"]
    assert set(row) == {
        "name", "library", "optimizer", "failed", "median_ms", "spread", "min_ms", "max_ms", "mean_ms", "samples_ms",
        "repeats", "first_step_ms", "ratio_to_baseline", "ratio_to_torch_muon", "state_bytes",
        "state_bytes_per_parameter", "step_peak_bytes", "error",
    }  # fmt: skip
    assert (row["library"], row["optimizer"], row["failed"], row["repeats"]) == ("asgo", "asgo", None, 4)
    samples = sorted(row["samples_ms"])
    assert row["median_ms"] == pytest.approx((samples[1] + samples[2]) / 2)
    assert (row["min_ms"], row["max_ms"], row["mean_ms"]) == (samples[0], samples[3], pytest.approx(sum(samples) / 4))
    quartiles = 0.25 * samples[0] + 0.75 * samples[1], 0.75 * samples[2] + 0.25 * samples[3]
    assert row["spread"] == pytest.approx((quartiles[1] - quartiles[0]) / 2 / row["median_ms"])
    base = rows[BASELINE]["samples_ms"]
    ratios = sorted(mine / theirs for mine, theirs in zip(row["samples_ms"], base, strict=True))
    assert row["ratio_to_baseline"] == pytest.approx((ratios[1] + ratios[2]) / 2)
    assert row["state_bytes_per_parameter"] == row["state_bytes"] / PARAMETERS
    # Sums of 24 products in float32, off by eps √24, of which a condition of 1e4 makes half of that as much.
    assert 0 < row["error"] < 3e-3
    assert "hello from a peer" in err


def test_one_that_fails_is_a_row_with_its_message(asgo: Run) -> None:
    code, out, err = asgo("optimizers", *options("torch.Broken", "dasgo"), "--repeats", "2")
    assert code == 0
    assert cells(out, "torch.Broken")[1:] == ["failed", "", "", "", "", "", ""]
    assert cells(out, "dasgo")[-1] == "2"
    assert "warning: torch.Broken failed: RuntimeError: [red]not today[/]" in err
    _, out, _ = asgo("optimizers", *options("torch.Broken"), "--repeats", "2", "--json")
    row = json.loads(out)["optimizers"][1]
    assert (row["failed"], row["median_ms"], row["samples_ms"]) == ("RuntimeError: [red]not today[/]", None, [])


def test_without_names_ours_and_torchs_are_measured_and_the_others_named(asgo: Run) -> None:
    code, out, err = asgo("optimizers", "--repeats", "1")
    assert code == 0
    for name in ("asgo", "dasgo", "muon", "shampoo", "asro", "accasro", "torch.RAdam", "torch.Muon"):
        assert cells(out, name)[-1] == "1"
    for library in PEER_LIBRARIES:
        assert f"{library} is not installed; its optimizers are left out" in err
    assert "failed" not in out


def test_without_a_budget_every_first_step_is_the_only_one(asgo: Run) -> None:
    code, out, err = asgo("optimizers", *options("dasgo"), "--budget", "0")
    assert code == 0
    row = cells(out, "dasgo")
    assert (row[-1], row[2]) == ("1*", "")
    assert row[1] == row[4]
    assert "n = 1*: the budget allowed only the first step" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "gpt3-layer"), "unknown model 'gpt3-layer'; did you mean 'gpt2-layer'?"),
        (("--optimizer", "asgoo"), "--optimizer asgoo: unknown optimizer: 'asgoo'; did you mean 'asgo'?"),
        (("--optimizer", "heavyball.SOAP"), "heavyball is not installed: pip install heavyball"),
        (("--optimizer", "asgo:root_steps=0"), "invalid root_steps: 0"),
        (("--repeats", "0"), "--repeats"),
        (("--threads", "0"), "--threads"),
        (("--budget", "-1"), "--budget"),
        (("--device", "tpu"), "--device"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(asgo: Run, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = asgo("optimizers", *arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert out == ""


def test_a_device_that_is_not_there_is_refused(asgo: Run) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    code, _, err = asgo("optimizers", "--device", "cuda")
    assert code == 2
    assert "--device cuda: not on this machine, which has cpu" in err


def test_bench_alone_shows_its_commands(asgo: Run) -> None:
    code, out, _ = asgo()
    assert code == 0
    assert "optimizers" in out
