"""`asgo export-model` and `asgo train gpt --init-from` as a user types them."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from asgo_cli import app as command_line
from pipelines.config import RunConfig
from pipelines.training.run_folder import checkpoint_folders
from pipelines.training.train import train
from tests.conftest import SMALL, SilentReporter
from tests.pipelines.exchange.test_classifier_export import save

Asgo = Callable[..., tuple[int, str]]

BRIEF = [part for key, value in SMALL.items() if not key.startswith("model.") for part in ("--set", f"{key}={value}")]
"""A short run whose model is given by the folder it begins with."""


@pytest.fixture
def asgo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Asgo:
    """Run a command in an empty folder, through the error boundary; its exit code and its words."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["asgo", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            command_line.main()
        return int(exit_.value.code or 0), capsys.readouterr().err

    return run


@pytest.fixture
def run(small_config: Callable[..., RunConfig], tmp_path: Path, reporter: SilentReporter) -> Path:
    """A finished run in runs/one."""
    train(small_config(), tmp_path / "runs/one", reporter)
    return Path("runs/one")


def test_it_says_what_it_wrote_of_what_and_how_to_use_it(
    asgo: Asgo, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, words = asgo("export-model", run, "--format", "hf", "--out", "models/one")
    assert code == 0, words
    first, last = words.splitlines()
    assert first == "models/one: the weights of runs/one/checkpoints/step-00000006"
    *command, script = shlex.split(last.removeprefix("next: "))
    assert command == ["python", "-c"]
    exec(script.replace("TEXT", "the cat"))
    assert "{'generated_text': 'the cat" in capsys.readouterr().out


def test_the_command_for_a_classifier_loads_it(asgo: Asgo, tmp_path: Path) -> None:
    _, checkpoint = save(tmp_path, "squeezenet1_1")
    code, words = asgo("export-model", checkpoint, "--format", "torchvision", "--out", "models/one")
    assert code == 0, words
    *_, script = shlex.split(words.splitlines()[-1])
    exec(script)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere", "--format", "hf"], 1, "nowhere: not a checkpoint"),
        (["runs/one", "--format", "onnx"], 2, "'onnx' is not one of 'hf', 'torchvision'"),
        (
            ["runs/one", "--format", "torchvision"],
            2,
            "--format torchvision does not support a GPT; use --format hf",
        ),
        (
            ["step-00000001", "--format", "hf"],
            2,
            "--format hf does not support a classifier of images; use --format torchvision",
        ),
    ],
)
def test_what_cannot_be_exported_is_told_in_one_line(
    asgo: Asgo, run: Path, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    save(tmp_path, "squeezenet1_1")
    told, words = asgo("export-model", *arguments, "--out", "models/one")
    assert (told, words.count("\n")) == (code, 1), words
    assert message in words
    assert not Path("models/one").exists()


def test_an_existing_folder_is_kept(asgo: Asgo, run: Path) -> None:
    code, words = asgo("export-model", run, "--format", "hf", "--out", run)
    assert (code, words) == (2, "error: runs/one: already exists; choose another --out\n")


def test_a_run_begins_with_an_exported_model_and_resumes_without_it(
    asgo: Asgo, run: Path, token_folder: Path, tmp_path: Path
) -> None:
    asgo("export-model", run, "--format", "hf", "--out", "first")
    begin = ["train", "gpt", "--preset", "tiny", "--data", token_folder, "--out", "two", *BRIEF, "--init-from"]
    code, words = asgo(*begin, "first", "--set", "model.n_layers=2", "--set", "model.d_ff=8")
    assert (code, words.count("\n")) == (2, 2)
    assert "error: model.d_ff is 8, but 32 in first: leave it out" in words
    assert asgo(*begin, "first")[0] == 0
    record = json.loads(Path("two/config.json").read_text())["config"]
    assert record["init_from"] == "first"
    assert (record["model"]["d_model"], record["model"]["context_length"]) == (16, 16)
    for later in checkpoint_folders(Path("two/checkpoints"))[1:]:
        (later / "state.json").unlink()
    Path("first").rename("gone")
    code, words = asgo("train", "gpt", "--resume", "--out", "two")
    assert code == 0, words
    assert "resuming from two/checkpoints/step-00000004" in words
    code, words = asgo("train", "gpt", "--resume", "--out", "two", "--init-from", "first")
    assert code == 0, "the same command again"


def test_a_run_is_not_continued_with_the_weights_of_another(asgo: Asgo, run: Path, token_folder: Path) -> None:
    asgo("export-model", run, "--format", "hf", "--out", "first")
    begin = ["train", "gpt", "--preset", "tiny", "--data", token_folder, "--out", "two", "--resume", *BRIEF]
    assert asgo(*begin, "--init-from", "first")[0] == 0
    tensors = load_file("first/model.safetensors")
    save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, "first/model.safetensors")
    code, words = asgo(*begin, "--init-from", "first")
    assert (code, words.count("\n")) == (2, 1)
    assert "two: cannot be resumed with another configuration: initial_weights_sha256 is" in words
