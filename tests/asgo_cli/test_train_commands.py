"""`asgo train`, `export-metrics` and `generate` as a user types them."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests import command_lines
from tests.conftest import SMALL

SETTINGS = [part for key, value in SMALL.items() for part in ("--set", f"{key}={value}")]


@pytest.fixture
def asgo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):  # type: ignore[no-untyped-def]
    """Run a command in an empty folder, through the error boundary."""
    monkeypatch.chdir(tmp_path)
    return command_lines.asgo


@pytest.fixture
def trained(asgo, token_folder: Path) -> Path:  # type: ignore[no-untyped-def]
    """A finished run in runs/one."""
    result = asgo("train", "gpt", "--preset", "tiny", "--data", token_folder, "--out", "runs/one", *SETTINGS)
    assert result.code == 0, result.err
    assert "done: validation loss" in result.err
    assert "asgo export-metrics runs/one" in result.err
    return Path("runs/one")


def test_flags_reach_the_configuration_and_set_wins(asgo, token_folder: Path) -> None:  # type: ignore[no-untyped-def]
    result = asgo(
        "train", "gpt", "--preset", "tiny", "--optimizer", "muon", "--data", "some/where", "--steps", 7, "--lr", "0.5",
        "--batch-size", 8, "--seed", 3, "--device", "cpu", "--compile", "--set", "training.steps=9", "--print-config",
    )  # fmt: skip
    config = tomllib.loads(result.out)
    assert result.code == 0
    assert config["optimizer"]["name"] == "muon"
    assert config["optimizer"]["lr"] == 0.5
    assert config["data"]["folder"] == "some/where"
    assert config["training"]["steps"] == 9
    assert config["training"]["batch_size"] == 8
    assert config["seed"] == 3
    assert (config["runtime"]["device"], config["runtime"]["compile"]) == ("cpu", True)


def test_a_printed_configuration_reproduces_itself(asgo) -> None:  # type: ignore[no-untyped-def]
    printed = asgo("train", "gpt", "--preset", "asgo-nanogpt", "--lr", "0.125", "--print-config").out
    Path("my.toml").write_text(printed, encoding="utf-8")
    assert asgo("train", "gpt", "--config", "my.toml", "--print-config").out == printed


def test_a_dry_run_counts_and_writes_nothing(asgo, token_folder: Path) -> None:  # type: ignore[no-untyped-def]
    result = asgo("train", "gpt", "--preset", "tiny", "--data", token_folder, "--dry-run", *SETTINGS)
    assert result.code == 0
    assert "384 (" in result.out, "6 steps of 4 sequences of 16 tokens"
    assert list(Path().iterdir()) == []


def test_a_dry_run_draws_the_schedule_and_writes_nothing_else(asgo, token_folder: Path) -> None:  # type: ignore[no-untyped-def]
    words = ["train", "gpt", "--preset", "tiny", "--optimizer", "adamw", "--data", token_folder, *SETTINGS, "--dry-run"]
    tables = ["--set", "schedule.momentum.warmup_steps=3", "--set", "schedule.weight_decay.kind=cosine"]
    launched = asgo(*words, *tables, "--plot", "new/one.svg", "--processes", 1)
    assert launched.code == 0, launched.err
    assert "--plot" not in launched.out
    assert "dry-run" not in launched.out
    assert "one.svg" not in launched.out
    drawing = Path("new/one.svg").read_text(encoding="utf-8")
    assert all(f">{title}</text>" in drawing for title in ("learning rate", "momentum", "weight decay", "step"))
    assert ">beta2</text>" not in drawing
    for name, start in {"one.png": b"\x89PNG", "one.pdf": b"%PDF"}.items():
        assert asgo(*words, f"--plot={name}").code == 0
        assert Path(name).read_bytes().startswith(start)
    assert sorted(path.name for path in Path().iterdir()) == ["new", "one.pdf", "one.png"]


def test_the_default_folder_names_preset_optimizer_and_seed(asgo, token_folder: Path) -> None:  # type: ignore[no-untyped-def]
    asgo("train", "gpt", "--preset", "tiny", "--data", token_folder, "--optimizer", "adamw", "--seed", 5, *SETTINGS)
    assert Path("runs/tiny-adamw-s5/metrics.jsonl").is_file()
    record = json.loads(Path("runs/tiny-adamw-s5/config.json").read_text())
    assert record["config"]["seed"] == 5
    assert record["environment"]["versions"]["torch"]
    assert "CPU" in record["environment"]["device"]


def test_resume_needs_nothing_but_the_folder(asgo, trained: Path) -> None:  # type: ignore[no-untyped-def]
    shutil.rmtree(trained / "checkpoints" / "step-00000006")
    result = asgo("train", "gpt", "--resume", "--out", trained)
    assert result.code == 0, result.err
    assert "resuming from runs/one/checkpoints/step-00000004" in result.err


def test_resume_with_other_settings_says_which(asgo, trained: Path) -> None:  # type: ignore[no-untyped-def]
    result = asgo("train", "gpt", "--resume", "--out", trained, "--steps", 99, "--lr", "0.5")
    assert result.code == 2
    assert "training.steps is 6 in the run, 99 now" in result.err
    assert "optimizer.lr is 0.001 in the run, 0.5 now" in result.err
    result = asgo("train", "gpt", "--resume", "--out", trained, "--optimizer", "asgo")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "holds a run with accasro, not asgo" in result.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--optimizer", "accasr"], 2, "--optimizer: unknown optimizer 'accasr'; did you mean 'accasro'?"),
        (["--preset", "tny"], 2, "--preset: unknown preset 'tny'; did you mean 'tiny'?"),
        (["--steps", "0"], 2, "--steps: training.steps = 0: should be greater than 0"),
        (["--lr", "-1"], 2, "--lr: optimizer.lr = -1.0: should be greater than or equal to 0"),
        (["--data", "nowhere/shakespeare_char"], 2, "asgo data shakespeare --out nowhere/shakespeare_char"),
        (["--data", "nowhere"], 2, "nowhere: no such data folder; make it with: asgo data text FILE... --out nowhere"),
        (["--config", "absent.toml"], 2, "absent.toml: No such file"),
        (["--set", "model.n_layer=3"], 2, "--set: model.n_layer: unknown key; did you mean 'n_layers'?"),
        (["--optimzer", "asgo"], 2, "--optimizer"),
        (["--steps", "many"], 2, "--steps"),
        (["--device", "tpu"], 2, "--device"),
        (["--plot", "one.png"], 2, "--plot: draws the schedule without training; add --dry-run"),
        (["--dry-run", "--plot", "one.jpg"], 2, "one.jpg: the name of a figure must end in .png, .pdf, .svg"),
        (["--steps", "3", "--set", "training.tokens=0"], 2, "--set: training.tokens = 0: should be greater than 0"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(asgo, arguments: list[str], code: int, message: str) -> None:  # type: ignore[no-untyped-def]
    result = asgo("train", "gpt", "--preset", "tiny", *arguments)
    assert result.code == code
    assert message in result.err
    assert result.err.count("\n") == 1
    assert result.err.startswith("error: ")
    assert list(Path().iterdir()) == []


def test_damaged_shards_are_refused_before_a_folder_is_made(asgo, token_folder: Path) -> None:  # type: ignore[no-untyped-def]
    for place, content, message in [
        (0, b"\x00\x00\x00\x00", "not a token shard"),
        (-2, b"\xff\xff", "beyond the vocabulary"),
        (None, b"", "truncated"),
    ]:
        shutil.rmtree("data", ignore_errors=True)
        shutil.copytree(token_folder, "data")
        shard = Path("data/shard_000001.bin")
        raw = bytearray(shard.read_bytes())
        if place is None:
            raw = raw[:-1]
        else:
            raw[place : place + len(content) or None] = content
        shard.write_bytes(raw)
        result = asgo("train", "gpt", "--preset", "tiny", "--data", "data", *SETTINGS)
        assert (result.code, result.err.count("\n")) == (1, 1)
        assert message in result.err
        assert "data/shard_000001.bin" in result.err
        assert not Path("runs").exists()


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_exported_figures_are_the_recorded_ones_to_the_last_bit(asgo, trained: Path) -> None:  # type: ignore[no-untyped-def]
    header = (
        "run,optimizer,step,epoch,tokens,samples,split,loss,accuracy,lr,grad_norm,"
        "step_ms,optimizer_ms,throughput,elapsed_s,top5_accuracy"
    )
    assert asgo("export-metrics", trained, "--out", "one.csv").code == 0
    text = Path("one.csv").read_text()
    Path("link.csv").symlink_to("one.csv")
    assert asgo("export-metrics", trained, "--out", "link.csv").code == 0
    assert Path("link.csv").is_symlink()
    assert text.splitlines()[0] == header
    recorded = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    for row, record in zip(rows_of(text), recorded, strict=True):
        assert (row.pop("run"), row.pop("optimizer"), row.pop("split")) == ("one", "accasro", record.pop("split"))
        assert {key: float(value) for key, value in row.items() if value} == record


def test_a_checkpoint_a_run_and_a_folder_of_runs_can_be_exported(asgo, trained: Path) -> None:  # type: ignore[no-untyped-def]
    shutil.copytree(trained, "runs/sweep/two")
    run = asgo("export-metrics", trained, "--out", "-").out
    last = asgo("export-metrics", trained / "checkpoints/step-00000006", "--out", "-").out
    assert last == run
    middle = rows_of(asgo("export-metrics", trained / "checkpoints/step-00000004", "--out", "-").out)
    assert middle == [row for row in rows_of(run) if int(row["step"]) <= 4]
    shutil.copytree(trained / "checkpoints/step-00000006", "alone")
    assert {row["run"] for row in rows_of(asgo("export-metrics", "alone", "--out", "-").out)} == {"alone"}
    assert {row["run"] for row in rows_of(asgo("export-metrics", "runs", "--out", "-").out)} == {"one", "sweep/two"}


def test_what_cannot_be_exported_is_named(asgo, trained: Path) -> None:  # type: ignore[no-untyped-def]
    Path("empty").mkdir()
    assert (asgo("export-metrics", "absent").code, asgo("export-metrics", "empty").code) == (2, 2)
    history = trained / "checkpoints/step-00000006/history.safetensors"
    history.write_bytes(history.read_bytes()[:-1])
    result = asgo("export-metrics", history.parent)
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert "history.safetensors: truncated" in result.err
    assert not Path("metrics.csv").exists()


def test_generated_text_goes_to_stdout_and_repeats_with_its_seed(asgo, trained: Path) -> None:  # type: ignore[no-untyped-def]
    first = asgo("generate", trained, "--prompt", "the cat", "--tokens", 20, "--seed", 1)
    assert first.code == 0, first.err
    assert first.out.startswith("the cat")
    assert len(first.out.rstrip("\n")) >= 27
    checkpoint = trained / "checkpoints/step-00000006"
    assert asgo("generate", checkpoint, "--prompt", "the cat", "--tokens", 20, "--seed", 1).out == first.out
    assert asgo("generate", trained, "--prompt", "the cat", "--tokens", 20, "--seed", 2).out != first.out


def test_generation_needs_no_data_folder_and_names_what_it_cannot_do(asgo, trained: Path) -> None:  # type: ignore[no-untyped-def]
    result = asgo("generate", trained, "--prompt", "Ω")
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert "'Ω'" in result.err
    model = trained / "checkpoints/step-00000006/model.safetensors"
    raw = bytearray(model.read_bytes())
    raw[-1] ^= 1
    model.write_bytes(raw)
    result = asgo("generate", model.parent)
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert "model.safetensors: damaged" in result.err
    result = asgo("generate", trained)
    assert result.code == 0, "the run's older checkpoint is good"
    assert f"warning: skipped {model}: damaged" in result.err
    assert asgo("generate", "absent").code == 1


def test_a_signal_ends_a_real_command_with_75(token_folder: Path, tmp_path: Path) -> None:
    import signal
    import time

    command = [
        sys.executable,
        "-m",
        "asgo_cli",
        "train",
        "gpt",
        "--preset",
        "tiny",
        "--data",
        token_folder,
        "--out",
        "run",
    ]
    settings = [*SETTINGS, "--steps", "1000000", "--set", "training.steps=1000000", "--set", "checkpoint.every=1000000"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*map(str, command), *settings], cwd=tmp_path, stderr=subprocess.PIPE, env=environment)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.is_file() or len(metrics.read_bytes()) < 1000:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    line = err.decode().splitlines()[-1]
    assert re.fullmatch(r"stopped: SIGTERM at step \d+: saved; continue with: asgo train gpt --resume --out run", line)


def test_one_damaged_run_among_good_ones_is_named_and_left_out(asgo, trained: Path) -> None:  # type: ignore[no-untyped-def]
    whole = asgo("export-metrics", "runs", "--out", "-").out
    for name, damage in {
        "empty": lambda run: (run / "config.json").write_text(""),
        "nested": lambda run: (run / "config.json").write_text("[" * 100_000),
        "zeros": lambda run: (run / "metrics.jsonl").write_bytes(bytes(5) + b"\n{}\n"),
        "deep": lambda run: (run / "metrics.jsonl").write_text("[" * 100_000 + "\n"),
        "loop": lambda run: ((run / "metrics.jsonl").unlink(), (run / "metrics.jsonl").mkdir()),
    }.items():
        shutil.copytree(trained, f"runs/{name}")
        damage(Path("runs", name))
    exported = asgo("export-metrics", "runs", "--out", "-")
    assert (exported.code, exported.out) == (0, whole)
    left_out = [line for line in exported.err.splitlines() if line.startswith("warning: left out: runs/")]
    assert sorted(line.split("/")[1] for line in left_out) == ["deep", "empty", "nested", "zeros"], "loop is no run"
    shutil.rmtree(trained)
    exported = asgo("export-metrics", "runs", "--out", "-")
    assert exported.code == 1
    assert all(line.startswith("error: runs/") for line in exported.err.splitlines() if not line.startswith("warning"))


@pytest.mark.parametrize(("warmup", "warns"), [(5, False), (6, True), (60, True)])
def test_a_warmup_that_never_ends_is_warned_about(asgo, token_folder: Path, warmup: int, warns: bool) -> None:  # type: ignore[no-untyped-def]
    words = ["train", "gpt", "--preset", "tiny", "--data", token_folder, *SETTINGS]
    result = asgo(*words, "--set", f"schedule.warmup_steps={warmup}", "--dry-run")
    assert result.code == 0
    assert (f"warning: the warm-up takes {warmup} steps and the run has 6: the learning rate" in result.err) == warns


def test_a_tilde_that_no_shell_expands_is_the_home_folder(asgo, token_folder: Path, monkeypatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    shutil.copytree(token_folder, tmp_path / "home/data")
    result = asgo("train", "gpt", "--preset", "tiny", "--data=~/data", "--out=~/runs/one", *SETTINGS)
    assert result.code == 0, result.err
    assert asgo("export-metrics", "~/runs", "--out=~/one.csv").code == 0
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == ["data", "one.csv", "runs"]
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert str(tmp_path / "home/none") in asgo("data", "fineweb", "--source=~/none").err, "a folder or a name"
    assert str(tmp_path / "home/my.toml") in asgo("sweep", "~/my.toml").err
    Path("~x").mkdir()
    assert "~x: neither a checkpoint" in asgo("export-metrics", "./~x").err


@pytest.mark.parametrize(
    "words",
    [("generate", "x", "--temperature"), ("compare", "x", "--confidence"), ("train", "gpt", "--lr"),
     ("data", "text", "x", "--out", "y", "--val-fraction")],
    ids=" ".join,
)  # fmt: skip
def test_nan_is_refused_where_a_number_is_asked_for(asgo, words: tuple[str, ...]) -> None:  # type: ignore[no-untyped-def]
    result = asgo(*words, "nan")
    assert (result.code, result.err) == (
        2, f"error: Invalid value for '{words[-1]}': nan is not a number (see --help)\n"
    )  # fmt: skip


@pytest.mark.parametrize("temperature", ["0", "1e-300", "1e-30", "1e30", "inf"])
def test_every_temperature_draws(asgo, trained: Path, temperature: str) -> None:  # type: ignore[no-untyped-def]
    words = ["generate", trained, "--tokens", 3, "--temperature", temperature]
    assert asgo(*words).code == asgo(*words, "--top-k", 2).code == 0
