"""What `pip install .` gives a user."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this source, built without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_the_source_archive_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    def build(source: Path, target: str) -> Path:
        command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(tmp_path)]
        subprocess.run(command, cwd=source, check=True, capture_output=True)
        (built,) = tmp_path.glob("*.tar.gz" if target == "sdist" else "*.whl")
        return built

    with tarfile.open(build(ROOT, "sdist")) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert {"LICENSE", "CITATION.cff", "CHANGELOG.md", "Makefile", "tests", "docs"} <= {
        path.name for path in source.iterdir()
    }
    again = build(source, "wheel")
    first, second = (
        {name: archive.read(name) for name in archive.namelist()}
        for archive in (zipfile.ZipFile(wheel), zipfile.ZipFile(again))
    )
    assert first == second


def test_the_wheel_holds_the_four_rooms_with_presets_vocabulary_and_kernels(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    packages = {name.split("/")[0] for name in names}
    assert {name for name in packages if not name.endswith(".dist-info")} == {
        "asgo_cli",
        "optim",
        "models",
        "pipelines",
    }
    presets = {str(path.relative_to(ROOT)) for path in (ROOT / "pipelines" / "presets").rglob("*.toml")}
    assert len(presets) >= 5
    vocabulary = {"pipelines/data/gpt2.tiktoken.xz", "pipelines/data/gpt2.tiktoken.LICENSE"}
    assert names >= {*presets, *vocabulary, "optim/native.c"}
    (information,) = (name for name in packages if name.endswith(".dist-info"))
    assert names >= {f"{information}/licenses/{file}" for file in ("LICENSE", "pipelines/data/gpt2.tiktoken.LICENSE")}


def test_an_installed_wheel_works_away_from_its_source(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}

    def run(*arguments: str) -> str:
        command = [sys.executable, "-P", "-m", "asgo_cli", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout

    assert "[optimizers" not in run("train", "gpt", "--preset", "asgo-gpt2", "--print-config")
    (tmp_path / "text.txt").write_text("hello world " * 100, encoding="utf-8")
    run("data", "text", "text.txt", "--out", "shards", "--val-fraction", "0.2")
    assert "good" in run("data", "verify", "shards")
    where = subprocess.run(
        [sys.executable, "-P", "-c", "import pipelines; print(pipelines.__file__)"],
        cwd=tmp_path, env=environment, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert where.startswith(str(tmp_path))
