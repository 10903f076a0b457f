"""What the shell completes: as bash asks for it, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from asgo_cli import names, viz
from asgo_cli.app import app
from models.vision import OWN_CLASSIFIERS, classifier_names
from optim import OPTIMIZER_NAMES
from pipelines.config import RuntimeSettings
from pipelines.resolve import preset_names
from pipelines.sweeps.definition import sweep_names
from pipelines.tasks import TASKS

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "numpy", "pydantic", "matplotlib", "plotly", "optuna", "pipelines.resolve")


def asked(*words: str) -> dict[str, str]:
    """By which variables bash asks for the last of the words after `asgo`."""
    return {"_ASGO_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(["asgo", *words]), "COMP_CWORD": f"{len(words)}"}


def complete(*words: str) -> list[str]:
    return CliRunner().invoke(app, [], env=asked(*words), prog_name="asgo").stdout.split()


def test_names_are_those_of_the_registries() -> None:
    assert names.OPTIMIZERS == OPTIMIZER_NAMES
    assert {name: sorted(task.presets) for name, task in TASKS.items()} == {
        task: preset_names(task) for task in ("gpt", "images")
    }
    assert sorted(names.SWEEPS) == sweep_names()
    assert (*OWN_CLASSIFIERS,) == names.OWN_CLASSIFIERS
    assert set(names.CLASSIFIERS) <= {*classifier_names()}
    assert RuntimeSettings(track=names.TRACKERS).track == names.TRACKERS


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["exp"], ["export-metrics", "export-model"]),
        (["train", "gpt", "--preset", "as"], ["asro-gpt", "asgo-gpt2", "asgo-nanogpt"]),
        (["train", "imagenet", "--preset", "a"], ["asro-imagenet"]),
        (["train", "images", "--preset", "m"], ["mnist-mlp"]),
        (["train", "gpt", "--optimizer", "sgd"], ["sgd-momentum", "sgd-nesterov"]),
        (["train", "images", "--model", "resnet1"], ["resnet18", "resnet101"]),
        (["train", "imagenet", "--model", "v"], ["vit_tiny", "vit_b_16"]),
        (["train", "gpt", "--track", "w"], ["wandb"]),
        (["viz", "abs_sum", "--optimizer", "adam"], ["adam", "adamw"]),
        (["viz", "noisy_r"], ["noisy_rosenbrock"]),
        (["bench", "optimizers", "--optimizer", "mu"], ["muon"]),
        (["bench", "train", "--optimizer", "mu"], ["muon"]),
        (["data", "text", "--tokenizer", "b"], ["bytes"]),
        (["train", "gpt", "--shard-m"], ["--shard-model"]),
        (["train", "gpt", "--data", "da"], []),  # the shell's own completion of files takes over
    ],
    ids=lambda value: " ".join(value),
)
def test_bash_is_given_names(words: list[str], expected: list[str]) -> None:
    assert complete(*words) == expected


def test_viz_completes_all_that_it_draws() -> None:
    assert complete("viz", "") == ["all", *viz.FUNCTION_NAMES, *viz.MATRIX_PROBLEMS]


def test_sweep_completes_shipped_names_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plans").mkdir()
    for file in ("asro-mine.toml", "notes.txt", "plans/deep.toml"):
        (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)
    assert complete("sweep", "asro-") == ["asro-gpt-paper", "asro-imagenet-paper", "asro-mine.toml"]
    assert complete("sweep", "plans/") == ["plans/deep.toml"]
    assert complete("sweep", "n") == []


def test_completing_loads_no_heavy_package() -> None:
    code = f"""
import atexit, sys
atexit.register(lambda: print(*set(sys.modules) & set({HEAVY}), file=sys.stderr))
from asgo_cli.app import app
app(prog_name="asgo")
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **asked("train", "gpt", "--optimizer", "mu")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr.strip()) == ("muon", "")


def test_the_script_for_bash_works_in_bash(tmp_path: Path) -> None:
    (tmp_path / "asgo").write_text(f"#!{sys.executable}\nfrom asgo_cli.app import main\nmain()\n")
    (tmp_path / "asgo").chmod(0o755)
    script = """
source <(_ASGO_COMPLETE=source_bash asgo)
COMP_WORDS=(asgo train gpt --optimizer sg); COMP_CWORD=4
_asgo_completion asgo
echo "${COMPREPLY[@]}"
complete -p asgo
"""
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path}
    done = subprocess.run(
        ["bash", "--norc", "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == ["sgd-momentum sgd-nesterov", "complete -o default -F _asgo_completion asgo"]
