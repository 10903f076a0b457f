"""`asgo data imagenet` and `asgo train imagenet` as typed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from asgo_cli import data
from pipelines.errors import UsageError
from tests.pipelines.data.imagenet.archive_makers import pictures, write_archives


def asgo_data(*arguments: object) -> Result:
    return CliRunner().invoke(data.app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_archives(tmp_path_factory.mktemp("archives"), pictures(3, 8, 4), kit="map_clsloc.txt")


@pytest.mark.parametrize(("option", "place"), [("--extract", "files"), ("--no-extract", "in ")])
def test_archives_become_a_folder_that_trains(option: str, place: str, archives: Path, tmp_path: Path):
    out = tmp_path / "my images"
    result = asgo_data("imagenet", "--archives", archives, "--out", out, option)
    assert result.exit_code == 0, result.output
    assert f"my images ({place}" in "".join(result.stdout.split("\n"))
    assert f"next: asgo train imagenet --data '{out}'" in result.stderr
    assert (out / "train" / "n01440764").is_dir() == (option == "--extract")
    again = asgo_data("imagenet", "--archives", archives, "--out", out, option)
    assert again.stdout == result.stdout
    other = "--no-extract" if option == "--extract" else "--extract"
    refused = asgo_data("imagenet", "--archives", archives, "--out", out, other)
    assert isinstance(refused.exception, UsageError)


def test_missing_archives_are_named_with_the_way_to_get_them(tmp_path: Path):
    result = asgo_data("imagenet", "--archives", tmp_path, "--out", tmp_path / "out")
    assert isinstance(result.exception, UsageError)
    for words in ("ILSVRC2012_img_train.tar", "ILSVRC2012_devkit_t12.tar.gz", "--download"):
        assert words in str(result.exception)
    assert "terms" not in result.stderr


def test_the_terms_are_shown_before_anything_is_downloaded(tmp_path: Path):
    address = "http://127.0.0.1:9/"  # where nobody listens
    command = [sys.executable, "-m", "asgo_cli", "data", "imagenet", "--archives", str(tmp_path / "archives")]
    command += ["--out", str(tmp_path / "out"), "--download", "--base-url", address]
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert done.returncode == 1
    terms, _, error = done.stderr.partition("error: ")
    assert "for research without commercial aims" in terms
    assert address in error
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_would_be_trained(archives: Path, tmp_path: Path):
    asgo_data("imagenet", "--archives", archives, "--out", tmp_path / "data", "--no-extract")
    command = [sys.executable, "-m", "asgo_cli", "train", "imagenet", "--data", str(tmp_path / "data"), "--dry-run"]
    command += ["--model", "squeezenet1_1", "--steps", "10", "--device", "cpu", "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    for words in ("squeezenet1_1, 724,035 parameters", "256 images", "2,560 (106.67 epochs)"):
        assert words in done.stdout
