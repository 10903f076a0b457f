"""`asgo data imagenet` and `asgo train imagenet` as typed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from asgo_cli import data, train
from pipelines.data.imagenet.hub import REPOSITORY
from pipelines.data.images.manifest import load_image_manifest
from pipelines.errors import UsageError
from tests import command_lines
from tests.hub import Hub, Status, client_environment, refusing_endpoint
from tests.pipelines.data.imagenet.archive_makers import pictures, write_archives
from tests.pipelines.data.imagenet.hub_makers import write_hub_copy


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
    assert "only for non-commercial research" in terms
    assert address in error
    assert not (tmp_path / "out").exists()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A hub with the gated copy of the same pictures."""
    made = write_hub_copy(tmp_path / "made", pictures(3, 8, 4))
    with Hub(tmp_path / "hub") as running:
        for path in sorted((made / "data").iterdir()):
            running.add(REPOSITORY, f"data/{path.name}", path.read_bytes())
        yield running


def asgo(endpoint: str, tmp_path: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command as a user does who has a token and takes `endpoint` for the hub."""
    environment = {**client_environment(endpoint, tmp_path / "home"), "HF_TOKEN": "hf_mine", "COLUMNS": "200"}
    command = [sys.executable, "-m", "asgo_cli", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=120, check=False, cwd=tmp_path
    )


def test_the_hubs_copy_is_fetched_once_and_trains_alike_in_both_layouts(hub: Hub, tmp_path: Path):
    from_hub = ["data", "imagenet", "--source", "hub", "--archives", "fetched"]
    extracted = asgo(hub.endpoint, tmp_path, *from_hub, "--out", "files", "--download")
    assert extracted.returncode == 0, extracted.stderr
    assert "only for non-commercial research" in extracted.stderr
    assert "next: asgo train imagenet --data files" in extracted.stderr
    assert {request.authorization for request in hub.downloads()} == {"Bearer hf_mine"}
    with refusing_endpoint() as nobody:  # what is there needs no network
        packed = asgo(nobody, tmp_path, *from_hub, "--out", "packed", "--no-extract")
    assert packed.returncode == 0, packed.stderr
    assert "packed (in packed/*.images)" in packed.stdout
    assert load_image_manifest(tmp_path / "packed").revision == hub.sha(REPOSITORY)
    shutil.rmtree(tmp_path / "fetched")  # nor is it needed any more

    rows = [train_two_steps(tmp_path / layout, tmp_path / f"run-{layout}") for layout in ("files", "packed")]
    assert [row["split"] for row in rows[0]] == ["val", "train", "train", "val"]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]


def train_two_steps(data_folder: Path, out: Path) -> list[dict[str, Any]]:
    small = ["--model", "squeezenet1_1", "--set", "data.resolution=32", "--workers", "1", "--device", "cpu"]
    steps = ["--steps", "2", "--batch-size", "4", "--set", "evaluation.every=2"]
    result = CliRunner().invoke(train.app, ["imagenet", "--data", str(data_folder), "--out", str(out), *small, *steps])
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("status", "part"),
    [(Status(401), "/api/"), (Status(403, code="GatedRepo"), "/resolve/")],
    ids=["wrong token", "no access"],
)
def test_whoever_may_not_have_the_hubs_copy_is_told_so_in_one_line(hub: Hub, tmp_path: Path, status: Status, part: str):
    hub.misbehave(status, part)
    done = asgo(hub.endpoint, tmp_path, "data", "imagenet", "--source", "hub", "--archives", "fetched", "--download")
    assert done.returncode == 1
    terms, _, error = done.stderr.partition("error: ")
    assert terms.endswith("https://image-net.org/download.php\n")
    assert error.count("\n") == 1
    assert f"HTTP {status.status}" in error
    assert "HF_TOKEN" in error
    assert not (tmp_path / "data").exists()


def test_the_archives_address_is_refused_for_the_hub(tmp_path: Path):
    result = asgo_data("imagenet", "--source", "hub", "--archives", tmp_path, "--base-url", "http://127.0.0.1:9/")
    assert isinstance(result.exception, UsageError)
    assert "--base-url" in str(result.exception)
    assert "HF_ENDPOINT" in str(result.exception)


def test_a_dry_run_says_what_would_be_trained(archives: Path, tmp_path: Path):
    asgo_data("imagenet", "--archives", archives, "--out", tmp_path / "data", "--no-extract")
    small = ["--model", "squeezenet1_1", "--steps", "10", "--device", "cpu", "--workers", "1"]
    done = command_lines.asgo("train", "imagenet", "--data", tmp_path / "data", "--dry-run", *small)
    assert done.code == 0, done.err
    for words in ("squeezenet1_1, 724,035 parameters", "256 images", "2,560 (106.67 epochs)"):
        assert words in done.out
