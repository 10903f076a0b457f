"""What `docs/adding.md` says is enough: what it adds is added to a copy of the source and used; its importer is run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from pipelines.data.images.image_sets import open_images
from pipelines.data.images.importing import import_images
from pipelines.data.images.index import SPLITS
from pipelines.data.images.verify import verify_images
from tests.conftest import SMALL
from tests.long import long
from tests.test_docs import blocks

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "adding.md"


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the four rooms with what the page adds."""
    copy = tmp_path_factory.mktemp("copy")
    for room in ("asgo_cli", "optim", "models", "pipelines"):
        shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
    file, _importer = blocks(PAGE, "python")
    (copy / "optim" / "lion.py").write_text(file)
    (copy / "lion.py").write_text(file)
    _commands, entry, _command, function = blocks(PAGE, "")
    insert(copy / "optim" / "specs.py", 'implied={**_FUSED_SGD, "nesterov": True},\n    ),\n', entry)
    insert(copy / "models" / "functions.py", "USUAL_FUNCTIONS = (\n", function)
    insert(copy / "asgo_cli" / "viz.py", "USUAL_FUNCTIONS = (\n", '    "bohachevsky",\n')
    return copy


def insert(file: Path, after: str, text: str) -> None:
    whole = file.read_text()
    assert whole.count(after) == 1, f"{file}: {after}"
    file.write_text(whole.replace(after, after + text))


def run(source: Path, *command: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-P", *command], cwd=source, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == code, ended.stderr
    return ended


def asgo(source: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    return run(source, "-m", "asgo_cli", *arguments, code=code)


# Commands one after the other in one process, which loads torch once.
IN_TURN = """
import json, sys
from asgo_cli.app import main
for words in json.loads(sys.argv[1]):
    sys.argv = ["asgo", *words]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, words
"""


def test_an_optimizer_trains_with_its_settings_recorded_by_path_and_by_name(extended: Path, token_folder: Path) -> None:
    """Both ways of the page: the runs are equal."""
    small = [f"--set={key}={value}" for key, value in SMALL.items()]
    losses, lines, runs = {}, [], {}
    for command in re.findall(r"^asgo (train gpt .*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE):
        words = command.split()
        words[words.index("data/mine")] = str(token_folder)
        name = words[words.index("--optimizer") + 1]
        runs[name] = f"run-{len(runs)}"
        lines += [[*words, *small, "--out", runs[name]], ["train", "gpt", "--resume", "--out", runs[name]]]
    run(extended, "-c", IN_TURN, json.dumps(lines))
    for name, folder in runs.items():
        settings = json.loads((extended / folder / "config.json").read_text())["config"]["optimizer"]
        assert (settings["name"], settings["lr"], settings["weight_decay"]) == (name, 3e-4, 0.1)
        rows = [json.loads(line) for line in (extended / folder / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [row["loss"] for row in rows if row["split"] == "val"]
    assert losses["./lion.py:Lion"] == losses["lion"]
    assert losses["lion"][-1] < losses["lion"][0]


@long
def test_a_wrong_keyword_of_an_added_optimizer_is_named(extended: Path) -> None:
    words = ["train", "gpt", "--preset", "tiny", "--optimizer", "lion", "--print-config"]
    told = asgo(extended, *words, "--set", "optimizer.momentum=0.9", code=2).stderr
    assert told.startswith("error: --set: optimizer.momentum: unknown key of this optimizer; these have it: asgo, ")
    told = asgo(extended, *words, "--set", "optimizer.betas=0.9,1.5", code=2).stderr
    assert told.strip() == "error: --set: optimizer.betas.1 = 1.5: should be less than 1"
    assert "unknown optimizer 'lio'; did you mean 'lion'?" in asgo(extended, *words[:5], "lio", code=2).stderr


def test_an_added_optimizer_is_drawn_on_an_added_function(extended: Path) -> None:
    optimizers = ("--optimizer", "lion:lr=0.01", "--optimizer", "lion")
    words = ["viz", "bohachevsky", *optimizers, "--steps", "500", "--json"]
    (drawn,) = json.loads(asgo(extended, *words).stdout)["functions"]
    trajectory, by_its_own_rate = drawn["trajectories"]
    assert trajectory["optimizer"] == by_its_own_rate["optimizer"] == "lion"
    assert trajectory["lowest_value"] < 5, "from (−4, 3) down among the waves"


def test_an_added_optimizer_leaves_the_suite_green(extended: Path) -> None:
    """Of the tests, those of this optimizer and of names, in the files that finish soon."""
    shutil.copytree(ROOT / "tests", extended / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", extended)
    files = ("optim/test_specs.py", "optim/test_build_optimizer.py", "pipelines/test_resolve.py")
    files += ("asgo_cli/test_completion.py", "pipelines/analysis/test_matrix_losses.py")
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--basetemp", "base"]
    command += [*(f"tests/{file}" for file in files), "-k", "lion or name"]
    environment = {**os.environ, "PYTHONPATH": str(extended)}
    ended = subprocess.run(command, cwd=extended, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout


@long
def test_an_added_optimizer_is_timed(extended: Path) -> None:
    words = ["bench", "optimizers", "--optimizer", "lion", "--repeats", "1", "--json"]
    assert '"lion"' in asgo(extended, *words).stdout


@pytest.mark.parametrize("extract", [True, False])
def test_an_added_importer_makes_a_folder_that_is_read_and_verified(tmp_path: Path, extract: bool) -> None:
    for split in SPLITS:
        with zipfile.ZipFile(tmp_path / f"{split}.zip", "w") as archive:
            for name in ("dog/2.jpg", "cat/1.jpg", "dog/1.jpg"):
                archive.writestr(name, f"{split} {name}")
    importer: dict[str, Any] = {}
    exec(blocks(PAGE, "python")[1], importer)
    out = tmp_path / "out"
    import_images(importer["CatsAndDogs"](tmp_path), out, extract=extract, report=lambda *_: None)
    data = open_images(out)
    assert [each.name for each in data.classes] == ["domestic cat", "domestic dog"]
    assert data.train.labels.tolist() == [0, 1, 1]
    assert [data.train.name(at) for at in range(3)] == ["cat/1.jpg", "dog/1.jpg", "dog/2.jpg"]
    assert [data.train.read(at) for at in range(3)] == [b"train cat/1.jpg", b"train dog/1.jpg", b"train dog/2.jpg"]
    assert verify_images(out, lambda *_: None) == []
