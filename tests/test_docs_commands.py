"""The commands of the documents are carried out as they stand there, on small data and with few steps.

Those that need what is not here are named with the reason.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from asgo_cli.app import app
from pipelines.data.image_sources.source import SourceOptions, prepare_images
from pipelines.data.text_to_shards import prepare_text
from pipelines.exchange.export import export_model
from pipelines.resolve import Layer, preset_layer, resolve
from pipelines.training.train import train
from tests.conftest import SMALL, WORDS, SilentReporter
from tests.pipelines.analysis.comparison.log_files import long_csv, losses_to
from tests.pipelines.data.image_sources.image_makers import class_files, write_folder, write_zip
from tests.pipelines.exchange.test_classifier_export import save
from tests.test_docs import commands

ELSEWHERE = {
    "--gpus": "needs GPUs",
    "--slurm": "needs Slurm: tests/asgo_cli/test_slurm.py and test_real_slurm.py do it",
    "--nodes": "needs several machines",
    "--processes": "takes seconds to start: tests/asgo_cli/test_launch.py does it",
    "--branch": "needs a run of thousands of steps: tests/asgo_cli/test_branch.py does it on less",
    "--until-certain": "trains many runs: tests/asgo_cli/test_sweep_until.py does it on less",
    "fineweb": "needs a network: tests/pipelines/data/corpus has a hub of its own",
    "openwebtext": "needs a copy of the hub's files: tests/pipelines/data/corpus makes one",
    "torchvision": "needs a network: tests/pipelines/data/image_sources makes such files",
    "hub": "needs a network: tests/pipelines/data/image_sources has a hub of its own",
    "images": "needs images: tests/asgo_cli/test_train_images.py makes some",
    "pictures": "needs runs on images: tests/asgo_cli/test_train_images.py makes some",
    "imagenet": "needs ImageNet: tests/asgo_cli/test_imagenet.py makes archives",
    "bench": "measures for minutes: tests/asgo_cli/test_bench*.py do it on less",
    "lion": "is to be added: tests/test_adding.py does it",
    "lion.py": "is to be written: tests/test_adding.py does it",
    "trunk": "needs a run of thousands of steps: tests/asgo_cli/test_branch.py does it on less",
    "track3": "needs the benchmark's shards; tests/asgo_cli/test_compare.py makes runs for its rule",
    "shakespeare": "needs a network, or --input",
    "results": "trains for an hour: `make results` does it, and tests/test_results.py looks at what it made",
}
"""Words of commands that this test leaves to others, and why."""

OF_A_RUN = {key: value for key, value in SMALL.items() if not key.startswith("model.")}
SWEEP = 'task = "gpt"\npreset = "tiny"\n[data]\nfolder = "data/text"\n[grid]\noptimizer.name = ["asgo", "adamw"]\n'
CLAIM = 'runs = ["runs/my"]\n[statement]\ncontender = "asgo"\nbetter_than = "adamw"\n'
FILES = {"sweeps.md": SWEEP, "README.md": SWEEP, "training.md": "[data]\nfolder = 'data/text'\n"}
"""What `my.toml` is on a page."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the documents speak of."""
    root = tmp_path_factory.mktemp("world")
    text = " ".join(random.Random(0).choices(WORDS, k=3000))
    (root / "books").mkdir()
    (root / "books" / "one.txt").write_text(text)
    with gzip.open(root / "articles.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text[start : start + 500]}) + "\n" for start in range(0, len(text), 500))
    write_folder(root / "photos", class_files({"cat": 5, "dog": 5}))
    write_zip(root / "photos.zip", class_files({"cat": 5, "dog": 5}))
    importing = {"workers": 1, "overwrite": False, "report": lambda *_: None, "notify": lambda _: None}
    prepare_images(str(root / "photos"), root / "data" / "photos", SourceOptions(), **importing)
    for name in ("mine", "text"):
        prepare_text([root / "books"], root / "data" / name, tokenizer="bytes", val_fraction=0.1)
    for name in ("asgo", "asgo-s1", "asgo-s2", "adamw-s1", "adamw-s2", "a", "b", "my/asgo-s1", "my/adamw-s1", "NAME"):
        values = {"optimizer.name": "adamw" if "adamw" in name else "asgo", "seed": int(name[-1:] == "2")}
        layer = Layer("test", {**SMALL, "data.folder": str(root / "data" / "mine"), **values})
        train(resolve([preset_layer("gpt", "tiny"), layer]), root / "runs" / name, SilentReporter())
    for name in ("adamw-s1", "adamw-s2", "muon-s1", "muon-s2"):
        long_csv(root / "logs" / name, losses_to(3.0))
    (root / "other.csv").write_text("iteration,nll\n0,6.0\n9,3.0\n")
    _, checkpoint = save(root / "b1" / "checkpoints", "efficientnet_b1")
    config = json.loads((checkpoint / "state.json").read_text())["config"]
    (root / "b1" / "config.json").write_text(json.dumps({"config": config}))
    for name in ("asgo", "gpt2"):
        export_model(root / "runs" / "asgo", "hf", root / "models" / name)
    return root


def shortened(words: list[str]) -> list[str]:
    """The command with what makes it small behind its own options."""
    if words[0] == "viz":
        return [*words, "--steps", "12"]
    is_new_run = words[0] == "train" and "--resume" not in words
    if not is_new_run and words[:2] != ["sweep", "my.toml"]:
        return words
    small = OF_A_RUN if "--init-from" in words else SMALL
    own_data = {} if "--data" in words or words[0] == "sweep" else {"data.folder": "data/mine"}
    return [*words, *(f"--set={key}={value}" for key, value in {**small, **own_data}.items())]


def reason_to_leave(words: list[str]) -> str | None:
    return next((why for key, why in ELSEWHERE.items() for word in words if key in re.split("[:/]", word)), None)


def link_or_copy(source: str, target: str) -> None:
    """Files of tensors, which are only ever replaced, are linked: they are tens of megabytes."""
    (os.link if source.endswith(".safetensors") else shutil.copy2)(source, target)


@pytest.mark.parametrize("words", list(commands()))
def test_a_command_in_the_documents_does_its_work(
    words: list[str], request: pytest.FixtureRequest, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = reason_to_leave(words)
    if reason is not None:
        pytest.skip(reason)
    shutil.copytree(world, tmp_path / "world", copy_function=link_or_copy)
    monkeypatch.chdir(tmp_path / "world")
    page = request.node.callspec.id.partition(":")[0]
    Path("my.toml").write_text(FILES.get(page, ""))
    Path("asgo-beats-adamw.toml").write_text(CLAIM)
    if page == "export.md":
        Path("b1").rename("runs/b1")
    if "--out" in words and "--resume" not in words:
        shutil.rmtree(words[words.index("--out") + 1], ignore_errors=True)
    result = CliRunner().invoke(app, shortened(words))
    assert result.exit_code == 0, f"{result.output}{result.exception!r}"
