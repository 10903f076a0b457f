"""`asgo bench train` through the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from asgo_cli import app, bench_train, console
from pipelines.benchmarks import training, training_workload
from pipelines.benchmarks.training import PLAIN

Run = Callable[..., tuple[int, str, str]]

SMALL = ("--model", "tiny", "--context", "16", "--batch-size", "4", "--device", "cpu", "--repeats", "2")


@pytest.fixture
def asgo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs `asgo bench train ...`; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console.data, "width", 120)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["asgo", "bench", "train", *arguments])
        with pytest.raises(SystemExit) as stopped:
            app.main()
        captured = capsys.readouterr()
        assert not any(tmp_path.iterdir())
        return int(stopped.value.code or 0), captured.out, captured.err

    return run


def cells(out: str, name: str) -> list[str]:
    (line,) = [line for line in out.splitlines() if line.startswith(f"│ {name} ")]
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_the_command_is_imported_without_torch() -> None:
    code = "import sys, asgo_cli.bench_train; sys.exit(len({'torch', 'numpy', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_models_of_the_help_are_those_that_there_are() -> None:
    assert bench_train.MODEL_NAMES == training_workload.MODEL_NAMES


def test_the_table_has_plain_pytorch_and_a_row_an_optimizer(asgo: Run) -> None:
    code, out, err = asgo(*SMALL, "--optimizer", "asgo", "--optimizer", "adamw:lr=0.1", "--micro-batch-size", "2")
    assert code == 0
    header = [line for line in out.splitlines() if line.startswith("┃")]
    titles = [" ".join(map(str.strip, pair)) for pair in zip(*(line[1:-1].split("┃") for line in header), strict=True)]
    assert titles[1:] == [" tokens/s", "step ms", "± %", "× plain", "optimizer %", "micro- batch", " n"]
    title = " ".join(out[: out.index("┏")].split())
    assert title.startswith("tiny, 0.8 M parameters: 4 layers, 4 heads, d 128, context 16, vocabulary 257; 64 tokens")
    plain, asgo_row, adamw = (cells(out, name) for name in (PLAIN, "asgo", "adamw:lr=0.1"))
    assert (plain[4], plain[-2], plain[-1]) == ("1.00", "2", "2")
    for row in (plain, asgo_row, adamw):
        assert float(row[1].replace(",", "")) == pytest.approx(64e3 / float(row[2]), rel=0.1)
        assert 0 < float(row[5]) < 100
    assert "a size for CPUs" not in err
    assert "next: asgo bench optimizers --model tiny --optimizer asgo --optimizer adamw:lr=0.1" in err


def test_a_preset_takes_the_place_of_a_model(asgo: Run) -> None:
    code, out, err = asgo(*SMALL[2:], "--preset", "track3-small", "--optimizer", "muon:lr=0.01")
    assert code == 0
    title = " ".join(out[: out.index("┏")].split())
    assert title.startswith("track3-small, 0.9 M parameters: 4 layers, 4 heads, d 128, context 16, vocabulary 384;")
    assert [cells(out, name)[-1] for name in (PLAIN, "muon:lr=0.01")] == ["2", "2"]
    assert "next: asgo train gpt --preset track3-small --print-config" in err


def test_json_is_everything_on_stdout(asgo: Run) -> None:
    code, out, _ = asgo(*SMALL, "--optimizer", "adamw", "--budget", "50", "--precision", "bf16", "--json")
    assert code == 0
    report = json.loads(out)
    plain, adamw = report.pop("candidates")
    assert report == {
        "model": "tiny", "parameters": 4 * (12 * 128**2 + 13 * 128) + (257 + 16 + 2) * 128, "layers": 4, "heads": 4,
        "d_model": 128, "context_length": 16, "vocab_size": 257, "batch_size": 4, "tokens_per_step": 64,
        "flops_per_token": 6 * (report["parameters"] - 16 * 128) + 12 * 4 * 128 * 16, "precision": "bfloat16",
        "compiled": False, "is_cpu_size": False, "device": report["device"], "device_type": "cpu",
        "threads": torch.get_num_threads(), "torch": torch.__version__, "peak_flops": None, "repeats": 2,
        "budget_s": 50.0, "baseline": PLAIN,
    }  # fmt: skip
    assert set(plain) == {
        "name", "failed", "micro_batch_size", "tokens_per_s", "median_ms", "spread", "samples_ms", "repeats",
        "first_step_s", "optimizer_share", "utilization", "speed", "state_bytes", "peak_bytes",
    }  # fmt: skip
    assert (plain["name"], plain["speed"], adamw["name"], adamw["repeats"]) == (PLAIN, 1.0, "adamw", 2)
    assert adamw["tokens_per_s"] == pytest.approx(64e3 / adamw["median_ms"])
    ratios = [theirs / own for own, theirs in zip(adamw["samples_ms"], plain["samples_ms"], strict=True)]
    assert min(ratios) <= adamw["speed"] <= max(ratios)


def test_one_that_fails_is_a_row_with_its_message(asgo: Run) -> None:
    name = "sgd-momentum:lr=1e30"
    code, out, err = asgo(*SMALL, "--optimizer", name, "--repeats", "4")
    assert code == 0
    assert cells(out, name)[1:] == ["failed", "", "", "", "", "4", ""]
    assert f"warning: {name} failed: Diverged: step 3: the loss is nan" in err
    assert cells(out, PLAIN)[-1] == "4"


def test_without_sizes_a_cpu_gets_a_small_one_that_says_so(asgo: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "CPU_SIZE", training_workload.DefaultSize("tiny", 64, 32))
    code, out, err = asgo("--device", "cpu", "--context", "16", "--budget", "0")
    assert code == 0
    assert [cells(out, name)[-2:] for name in (PLAIN, "adamw", "accasro", "muon", "asgo")] == [["2", "1*"]] * 5
    assert "a size for CPUs; on a CUDA device: GPT-2 124 M" in err
    assert "n = 1*: the budget allowed only the first step" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "gpt2-layer"), "--model: unknown model 'gpt2-layer'; known: gpt2, asro-gpt"),
        (("--optimizer", "torch.Muonn"), "--optimizer torch.Muonn: unknown optimizer of torch.optim: 'Muonn'; did you"),
        (("--optimizer", "asgo:lr=fast"), "--optimizer asgo:lr=fast: optimizer.lr = 'fast': should be a valid number"),
        (("--micro-batch-size", "3"), "--micro-batch-size 3: does not divide the batch of 4"),
        (("--preset", "track3"), "--preset: has a model of its own; leave --model out"),
        (("--batch-size", "0"), "--batch-size"),
        (("--precision", "fp8"), "--precision"),
        (("--budget", "-1"), "--budget"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(asgo: Run, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = asgo(*SMALL, *arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert out == ""
