"""The hub's gated copy arrives whole with the user's token, and its files read as pictures named with their class."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from pipelines.data.hub_copy import LISTING
from pipelines.data.imagenet.hub import REPOSITORY, hub_files
from pipelines.data.imagenet.hub_files import read_hub_classes, read_hub_file
from pipelines.data.images.streams import StreamedImage
from pipelines.errors import AsgoError
from tests.hub import Drip, Drop, Hub, Stall, Status, client_environment, refusing_endpoint

from .hub_makers import Row, features, write_rows
from .kills import KILLS

TENCH, GOLDFISH = "n01440764", "n01443537"
NAMES = ("tench, Tinca tinca", "goldfish, Carassius auratus")
PROGRAM = """
import sys
from pathlib import Path
from pipelines.data import retries
from pipelines.data.imagenet.hub import download_hub_copy
from pipelines.errors import AsgoError

retries.PAUSES_S, retries.NO_NETWORK_S = (float(sys.argv[2]),), 60.0
try:
    print(download_hub_copy(Path(sys.argv[1]), progress=lambda *_: None, notify=print))
except AsgoError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def write_file(path: Path, rows: Sequence[Row], *, note: Any = None) -> Path:
    """With a note that names both classes, or another one."""
    return write_rows(path, rows, features(NAMES) if note is None else note)


def train_rows(seed: int, count: int = 250) -> list[Row]:
    choose = random.Random(seed)
    wnids = choose.choices((TENCH, GOLDFISH), k=count)
    return [
        (choose.randbytes(2000), f"{wnid}_{seed}{index:03d}_{wnid}.JPEG", int(wnid == GOLDFISH))
        for index, wnid in enumerate(wnids)
    ]


# --- reading ------------------------------------------------------------------------------------------------------


def test_pictures_come_in_order_with_their_official_names(tmp_path: Path) -> None:
    rows = train_rows(1)
    images = list(read_hub_file(write_file(tmp_path / "a.parquet", rows)))
    assert [image.content for image in images] == [content for content, *_ in rows]
    assert [f"{image.name[:-5]}_{image.class_id}.JPEG" for image in images] == [name for _, name, _ in rows]


def test_only_a_part_of_a_file_is_in_memory(tmp_path: Path) -> None:
    rows = [(random.Random(index).randbytes(50_000), f"{TENCH}_{index}_{TENCH}.JPEG", 0) for index in range(1000)]
    path = write_file(tmp_path / "a.parquet", rows)
    before = pyarrow.total_allocated_bytes()
    peak = max(pyarrow.total_allocated_bytes() for _ in read_hub_file(path)) - before
    assert peak < path.stat().st_size / 2


def test_validation_pictures_are_named_with_their_class(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.parquet", [(b"jpeg", f"ILSVRC2012_val_00000293_{TENCH}.JPEG", 0)])
    assert list(read_hub_file(path)) == [StreamedImage(TENCH, "ILSVRC2012_val_00000293.JPEG", b"jpeg")]


def test_classes_are_named_by_their_label(tmp_path: Path) -> None:
    paths = [write_file(tmp_path / f"{seed}.parquet", train_rows(seed)) for seed in (1, 2)]
    assert read_hub_classes(paths) == {TENCH: NAMES[0], GOLDFISH: NAMES[1]}


@pytest.mark.parametrize(
    "name",
    [
        None,
        "n01440764_1.JPEG",
        f"{TENCH}_1_{GOLDFISH}.JPEG",
        f"../{TENCH}_1_{TENCH}.JPEG",
        f"/{TENCH}_1_{TENCH}.JPEG",
        f"ILSVRC2012_test_00000001_{TENCH}.JPEG",
        f"{TENCH}_1_{TENCH}.JPEG\n",
    ],
)
def test_a_name_of_another_form_is_refused(tmp_path: Path, name: str | None) -> None:
    path = write_file(tmp_path / "a.parquet", [(b"jpeg", name, 0)])
    with pytest.raises(AsgoError, match=r"a\.parquet.*not a name of an ImageNet image"):
        list(read_hub_file(path))
    with pytest.raises(AsgoError, match=r"a\.parquet.*not a name of an ImageNet image"):
        read_hub_classes([path])


@pytest.mark.parametrize("content", [None, b""])
def test_a_picture_without_bytes_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = write_file(tmp_path / "a.parquet", [(content, f"{TENCH}_7_{TENCH}.JPEG", 0)])
    with pytest.raises(AsgoError, match=rf"a\.parquet: {TENCH}_7\.JPEG has no bytes"):
        list(read_hub_file(path))


@pytest.mark.parametrize("wrong", [(b"x", f"{TENCH}_1_{TENCH}.JPEG", 1), (b"x", f"{TENCH}_1_{TENCH}.JPEG", -1)])
def test_a_label_that_is_not_its_classes_is_refused(tmp_path: Path, wrong: Row) -> None:
    path = write_file(tmp_path / "a.parquet", [*train_rows(1), wrong])
    with pytest.raises(AsgoError, match=r"a\.parquet: label"):
        read_hub_classes([path])


@pytest.mark.parametrize("note", [{}, {"info": {"features": {}}}, []])
def test_a_file_that_does_not_name_its_classes_is_refused(tmp_path: Path, note: Any) -> None:
    with pytest.raises(AsgoError, match="the names of the classes are missing"):
        read_hub_classes([write_file(tmp_path / "a.parquet", train_rows(1), note=note)])


@pytest.mark.parametrize("damage", ["cut", "overwritten", "empty", "other columns", "missing"])
def test_a_damaged_file_is_one_line_with_its_name(tmp_path: Path, damage: str) -> None:
    path = write_file(tmp_path / "a.parquet", train_rows(1))
    content = path.read_bytes()
    match damage:
        case "cut":
            path.write_bytes(content[: len(content) // 2])
        case "overwritten":
            path.write_bytes(content[:1000] + b"\xff" * 100_000 + content[101_000:])
        case "empty":
            path.write_bytes(b"")
        case "other columns":
            parquet.write_table(pyarrow.table({"image": ["a"], "label": [1]}), path)
        case "missing":
            path.unlink()
    with pytest.raises(AsgoError, match=r"a\.parquet") as raised:
        list(read_hub_file(path))
    assert "\n" not in str(raised.value)


def test_the_files_of_a_split_are_found_in_order_or_the_missing_one_is_named(tmp_path: Path) -> None:
    for index in (2, 0, 1):
        write_file(tmp_path / "data" / f"train-{index:05d}-of-00003.parquet", train_rows(1, 1))
    write_file(tmp_path / "data" / "test-00000-of-00001.parquet", train_rows(1, 1))
    assert [path.name[:11] for path in hub_files(tmp_path, "train")] == ["train-00000", "train-00001", "train-00002"]
    (tmp_path / "data" / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(AsgoError, match="train file 00001 is missing"):
        hub_files(tmp_path, "train")
    with pytest.raises(AsgoError, match="validation file 00000 is missing"):
        hub_files(tmp_path, "validation")


# --- downloading --------------------------------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path: Path) -> dict[str, bytes]:
    """The files of a small copy, by path."""
    files = {f"data/train-{index:05d}-of-00003.parquet": train_rows(index) for index in range(3)}
    files["data/validation-00000-of-00001.parquet"] = [(b"jpeg", f"ILSVRC2012_val_00000293_{TENCH}.JPEG", 0)]
    return {path: write_file(tmp_path / "made" / path, rows).read_bytes() for path, rows in files.items()}


@pytest.fixture
def hub(tmp_path: Path, served: Mapping[str, bytes]) -> Iterator[Hub]:
    """A hub with that copy, and a split that nobody asked for."""
    with Hub(tmp_path / "hub") as running:
        for path, content in {**served, "data/test-00000-of-00001.parquet": b"test", "README.md": b"#"}.items():
            running.add(REPOSITORY, path, content)
        yield running


def start(tmp_path: Path, endpoint: str, pause_s: float = 0.01) -> subprocess.Popen[str]:
    environment = {**client_environment(endpoint, tmp_path / "home"), "HF_TOKEN": "hf_mine"}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "archives"), str(pause_s)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def fetch(tmp_path: Path, endpoint: str, pause_s: float = 0.01) -> tuple[int, str, str]:
    process = start(tmp_path, endpoint, pause_s)
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


def files_of(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*.parquet") if path.is_file() and ".cache" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def stored_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_both_splits_arrive_once_with_the_token_and_wrong_ones_again(
    tmp_path: Path, hub: Hub, served: Mapping[str, bytes]
) -> None:
    archives = tmp_path / "archives"
    assert fetch(tmp_path, hub.endpoint) == (0, f"{hub.sha(REPOSITORY)}\n", "")
    assert files_of(archives) == served
    assert f'"revision": "{hub.sha(REPOSITORY)}"' in (archives / LISTING).read_text()
    assert {request.authorization for request in hub.downloads()} == {"Bearer hf_mine"}
    # Nothing lies twice on the disk.
    assert stored_in(tmp_path / "home") + stored_in(archives / ".cache") < 10_000

    hub.forget_requests()
    damaged = next(iter(served))
    content = bytearray(served[damaged])
    content[5000] ^= 1
    (archives / damaged).write_bytes(content)
    status, output, _ = fetch(tmp_path, hub.endpoint)
    assert status == 0
    assert f"{damaged}: differs from the hub's file; downloading it again" in output
    assert files_of(archives) == served
    assert {request.path.rpartition("/")[2] for request in hub.downloads()} == {damaged[5:]}


def test_kills_and_dropped_connections_leave_what_goes_on_to_the_same_files(
    tmp_path: Path, hub: Hub, served: Mapping[str, bytes]
) -> None:
    hub.misbehave(Drip(400_000), ".parquet")
    for seed in range(KILLS):
        process, asked = start(tmp_path, hub.endpoint), len(hub.downloads())
        while len(hub.downloads()) == asked and process.poll() is None:
            time.sleep(0.01)
        time.sleep(random.Random(seed).uniform(0, 1.0))
        process.kill()
        process.communicate()
    hub.behave()
    hub.misbehave(Drop(after=0.5), ".parquet", times=2)
    status, output, _ = fetch(tmp_path, hub.endpoint)
    assert (status, files_of(tmp_path / "archives")) == (0, served)
    assert "Trying to resume" in output
    assert list(tmp_path.rglob("*.incomplete")) == []


def test_whoever_has_no_access_is_told_where_to_ask(tmp_path: Path, hub: Hub) -> None:
    hub.misbehave(Status(403, code="GatedRepo"), "/resolve/")
    status, _, errors = fetch(tmp_path, hub.endpoint)
    assert (status, errors.count("\n")) == (1, 1)
    assert f"request access at {hub.endpoint}/datasets/{REPOSITORY}" in errors
    assert "HF_TOKEN" in errors


def test_no_network_is_said_before_a_pause_that_is_too_long(tmp_path: Path) -> None:
    with refusing_endpoint() as endpoint:
        status, _, errors = fetch(tmp_path, endpoint, pause_s=3600)
    assert (status, errors.count("\n")) == (1, 1)
    assert "no answer from the network" in errors
    assert not (tmp_path / "archives").exists()


def test_a_signal_ends_it_soon(tmp_path: Path, hub: Hub) -> None:
    hub.misbehave(Stall(600, after=0.5), "train-00001", times=1)
    process = start(tmp_path, hub.endpoint)
    while not hub.downloads("train-00001"):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)  # which is long before the server goes on
    assert (process.returncode, errors.count("\n")) == (75, 1)
    assert os.listdir(tmp_path / "archives" / "data") == ["train-00000-of-00003.parquet"]  # noqa: PTH208
