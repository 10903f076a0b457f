"""The hub's copy becomes the same ImageNet as the archives, in either layout, and every ended call goes on."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from pipelines.data import parquet_text
from pipelines.data.hub_copy import LISTING, HubFile, Listing
from pipelines.data.imagenet.hub_files import read_hub_classes, read_hub_file
from pipelines.data.imagenet.importer import prepare_imagenet
from pipelines.data.images.image_sets import open_images
from pipelines.data.images.manifest import ImageManifest
from pipelines.data.progress import Progress
from pipelines.errors import AsgoError, UsageError
from pipelines.storage import sha256_of

from .archive_makers import Content, noise, tree, write_archives
from .hub_makers import features, write_hub_copy, write_rows
from .kills import KILLS

CHILD = """
import sys
from pathlib import Path
import numpy, pyarrow
from pipelines.data.imagenet.importer import prepare_imagenet

pyarrow.array(numpy.array([b""]))  # the first one brings pandas where there is one, which takes a second

def report(phase, done, total):
    if phase != heard[-1]:
        heard.append(phase)
        print(phase, flush=True)

heard = [""]
folder, out, extract = sys.argv[1:]
prepare_imagenet(Path(folder), Path(out), origin="hub", extract=bool(extract), workers=2, report=report)
"""
LAYOUTS = pytest.mark.parametrize("extract", [True, False], ids=["extracted", "packed"])


def unheard(phase: str, done: int, total: int) -> None:
    """A report that nobody hears."""


def prepare(folder: Path, out: Path, *, extract: bool = True, report: Progress = unheard, **more: Any) -> ImageManifest:
    return prepare_imagenet(folder, out, origin="hub", extract=extract, workers=2, report=report, **more)


@pytest.fixture
def content() -> Content:
    return noise(classes=5, train=8, validation=3, largest=2000)


@pytest.fixture
def copy(tmp_path: Path, content: Content) -> Path:
    return write_hub_copy(tmp_path / "hub", content)


def images_in(out: Path) -> dict[str, bytes]:
    return {name: each for name, each in tree(out).items() if "/" in name}


def test_extracted_it_is_the_same_as_from_the_archives(tmp_path: Path, content: Content, copy: Path) -> None:
    archives = write_archives(tmp_path / "archives", content)
    expected = prepare_imagenet(archives, tmp_path / "expected", extract=True, report=unheard)
    manifest = prepare(copy, tmp_path / "out")
    assert images_in(tmp_path / "out") == images_in(tmp_path / "expected")
    assert tree(tmp_path / "out").keys() == tree(tmp_path / "expected").keys()
    assert manifest.fingerprint == expected.fingerprint
    assert manifest.classes == expected.classes


def test_in_one_file_a_split_the_images_are_read_in_the_same_order_as_from_the_archives(
    tmp_path: Path, content: Content, copy: Path
) -> None:
    archives = write_archives(tmp_path / "archives", content)
    prepare_imagenet(archives, tmp_path / "expected", extract=False, report=unheard)
    prepare(copy, tmp_path / "out", extract=False)
    files = ["manifest.json", "train.images", "train.parquet", "val.images", "val.parquet"]
    assert sorted(tree(tmp_path / "out")) == files
    expected, made = open_images(tmp_path / "expected"), open_images(tmp_path / "out")
    assert made.fingerprint == expected.fingerprint
    for ours, theirs in ((made.train, expected.train), (made.validation, expected.validation)):
        assert [(ours.name(at), ours.read(at)) for at in range(len(ours))] == [
            (theirs.name(at), theirs.read(at)) for at in range(len(theirs))
        ]
        assert ours.labels.tolist() == theirs.labels.tolist()


def test_the_manifest_has_the_commit_and_the_digests_of_the_files(tmp_path: Path, copy: Path) -> None:
    paths = sorted((copy / "data").iterdir())
    write_listing(copy)
    manifest = prepare(copy, tmp_path / "out")
    assert manifest.revision == "c0ffee"
    assert {each.file: each.digest for each in manifest.source_files} == {
        f"data/{path.name}": f"sha256:{sha256_of(path)}" for path in paths
    }


def write_listing(copy: Path) -> None:
    files = [
        HubFile(path=f"data/{path.name}", bytes=path.stat().st_size, sha256=sha256_of(path))
        for path in sorted((copy / "data").iterdir())
    ]
    (copy / LISTING).write_text(Listing(revision="c0ffee", files=tuple(files)).model_dump_json())


def test_a_file_that_is_not_what_the_hub_told_is_refused(tmp_path: Path, copy: Path) -> None:
    write_listing(copy)
    path = copy / "data" / "train-00001-of-00003.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(
        AsgoError, match=r"train-00001-of-00003\.parquet: its SHA-256 is not the one that the hub lists"
    ):
        prepare(copy, tmp_path / "out")


def test_a_missing_file_is_named_and_no_folder_is_left(tmp_path: Path, copy: Path) -> None:
    (copy / "data" / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(AsgoError, match=r"train file 00001 is missing; get it with --download"):
        prepare(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@LAYOUTS
def test_a_damaged_file_is_one_line_and_when_it_is_mended_the_work_goes_on(
    tmp_path: Path, copy: Path, extract: bool
) -> None:
    undisturbed = prepare(copy, tmp_path / "undisturbed", extract=extract), tree(tmp_path / "undisturbed")
    path = copy / "data" / "validation-00001-of-00002.parquet"
    whole, status = path.read_bytes(), path.stat()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AsgoError, match=r"validation-00001-of-00002\.parquet: .*damaged file") as caught:
        prepare(copy, tmp_path / "out", extract=extract)
    assert "\n" not in str(caught.value)
    with pytest.raises(AsgoError, match=r"incomplete; resume with: asgo data imagenet --source hub --archives"):
        open_images(tmp_path / "out")
    path.write_bytes(whole)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(UsageError, match=r"has changed since .*out was started; pass --overwrite"):
        prepare(copy, tmp_path / "out", extract=extract)
    assert prepare(copy, tmp_path / "out", extract=extract, overwrite=True) == undisturbed[0]
    assert tree(tmp_path / "out") == undisturbed[1]


@LAYOUTS
def test_two_pictures_of_one_name_are_refused(tmp_path: Path, copy: Path, extract: bool) -> None:
    paths = [copy / "data" / f"train-0000{number}-of-00003.parquet" for number in (0, 1)]
    paths[1].write_bytes(paths[0].read_bytes())
    with pytest.raises(AsgoError, match=r"data: two images of the class n10000000 are named n\d+_\d+\.JPEG"):
        prepare(copy, tmp_path / "out", extract=extract)


def test_a_picture_that_a_file_repeats_is_refused_before_the_next_one(tmp_path: Path) -> None:
    """A dictionary of one picture makes a billion rows of a kilobyte."""
    row = (b"jpeg", "n01440764_1_n01440764.JPEG", 0)
    path = write_rows(tmp_path / "a.parquet", [row] * 3, features(["a"]))
    met = []
    with pytest.raises(AsgoError, match=r"a\.parquet: two images are named n01440764_1\.JPEG"):
        met += read_hub_file(path)
    with pytest.raises(AsgoError, match=r"a\.parquet: two images are named n01440764_1\.JPEG"):
        read_hub_classes([path])


@pytest.mark.parametrize("large", [0, 1], ids=["picture", "name"])
def test_a_page_that_claims_too_much_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: int
) -> None:
    monkeypatch.setattr(parquet_text, "MAX_PAGE_BYTES", 1000)
    row = (b"x" * 2000, "n01440764_1_n01440764.JPEG", 0) if large == 0 else (b"x", "x" * 2000, 0)
    path = write_rows(tmp_path / "a.parquet", [row], features(["a"]))
    with pytest.raises(AsgoError, match=r"a\.parquet: a page has 2,0\d\d bytes, more than 1,000"):
        list(read_hub_file(path))


def test_few_rows_are_read_at_once_where_they_are_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_text, "_BYTES_AT_ONCE", 10_000)
    sizes = []
    batches = parquet.ParquetFile.iter_batches

    def counting(table: parquet.ParquetFile, rows: int, **more: Any) -> Iterator[Any]:
        sizes.append(rows)
        return batches(table, rows, **more)

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", counting)
    rows = [(bytes(3000), f"n01440764_{number}_n01440764.JPEG", 0) for number in range(5)]
    assert len(list(read_hub_file(write_rows(tmp_path / "a.parquet", rows, features(["a"]))))) == 5
    assert sizes == [3]


@LAYOUTS
def test_a_class_that_no_picture_trains_is_refused(tmp_path: Path, copy: Path, extract: bool) -> None:
    validation = copy / "data" / "validation-00000-of-00002.parquet"
    before = validation.read_bytes()
    write_rows(validation, [(b"jpeg", "ILSVRC2012_val_00000001_n99999999.JPEG", 0)], features(["a"]))
    with pytest.raises(AsgoError, match=r"val_00000001\.JPEG has the class n99999999, which has no training images"):
        prepare(copy, tmp_path / "out", extract=extract)
    validation.write_bytes(before)
    for path in (copy / "data").glob("train-*"):
        rows = parquet.read_table(path).to_pylist()
        kept = [(row["image"]["bytes"], row["image"]["path"], row["label"]) for row in rows if row["label"] != 2]
        write_rows(path, kept, features("abcde"))
    with pytest.raises(AsgoError, match=r"data: no image of class 2, c; download the files again"):
        prepare(copy, tmp_path / "other", extract=extract)


def test_a_disk_too_small_is_refused_before_anything_is_written(copy: Path, small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("size=128k")
    with pytest.raises(
        AsgoError, match=r"the images take .* GB and .* GB are free; free some space, or choose another"
    ):
        prepare(copy, disk / "out")
    assert images_in(disk / "out") == {}


def test_a_file_of_somebody_else_among_the_images_is_named(tmp_path: Path, copy: Path) -> None:
    mine = tmp_path / "out" / "train" / ".n10000000.partial" / "mine.txt"

    def stop(phase: str, done: int, total: int) -> None:
        if phase.startswith("extracting"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(copy, tmp_path / "out", report=stop)
    mine.write_text("mine")
    with pytest.raises(AsgoError, match=r"\.n10000000\.partial/mine\.txt: not part of the archive; remove it"):
        prepare(copy, tmp_path / "out")
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("moment", ["extracting to val", "waiting"])
def test_images_that_a_power_cut_took_are_written_again(tmp_path: Path, copy: Path, moment: str) -> None:
    undisturbed = prepare(copy, tmp_path / "undisturbed"), tree(tmp_path / "undisturbed")
    out = tmp_path / "out"

    def stop(phase: str, done: int, total: int) -> None:
        if phase.startswith(moment):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(copy, out, report=stop)
    first, second, *_ = sorted((out / "train" / "n10000000").iterdir())
    first.unlink()
    second.write_bytes(b"")
    assert (prepare(copy, out), tree(out)) == undisturbed


def test_other_sources_are_other_options(tmp_path: Path, content: Content, copy: Path) -> None:
    prepare(copy, tmp_path / "out", extract=False)
    write_archives(copy, content)
    with pytest.raises(UsageError, match=r"complete, made with --source hub and not --source archives; pass the same"):
        prepare_imagenet(copy, tmp_path / "out", extract=False, report=unheard)


@LAYOUTS
def test_overwriting_leaves_nothing_of_the_other_layout(tmp_path: Path, copy: Path, extract: bool) -> None:
    prepare(copy, tmp_path / "expected", extract=extract)
    prepare(copy, tmp_path / "out", extract=not extract)
    prepare(copy, tmp_path / "out", extract=extract, overwrite=True)
    assert tree(tmp_path / "out") == tree(tmp_path / "expected")


def test_a_packed_file_that_is_gone_or_cut_is_not_read_from(tmp_path: Path, copy: Path) -> None:
    prepare(copy, tmp_path / "out", extract=False)
    path = tmp_path / "out" / "val.images"
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(AsgoError, match=rf"val\.images: {size - 1:,} bytes long, not {size:,}; make the folder again"):
        open_images(tmp_path / "out")
    path.unlink()
    with pytest.raises(AsgoError, match=r"val\.images: missing; make the folder again with --overwrite"):
        open_images(tmp_path / "out")


@LAYOUTS
def test_killed_again_and_again_it_ends_with_the_same_folder(tmp_path: Path, extract: bool) -> None:
    content = noise(classes=20, train=60, validation=20, largest=4000)
    copy = write_hub_copy(tmp_path / "hub", content, train=12, validation=4)
    undisturbed = prepare(copy, tmp_path / "undisturbed", extract=extract), tree(tmp_path / "undisturbed")
    rng, moments, folders = random.Random(KILLS), list[int](), 0
    while len(moments) < KILLS:
        out = tmp_path / f"out{folders}"
        while len(moments) < KILLS and kill_before_the_end(copy, out, extract, rng):
            moments.append(files_done(out))
            with pytest.raises(AsgoError, match="incomplete; resume with"):
                open_images(out)
        assert (prepare(copy, out, extract=extract), tree(out)) == undisturbed
        folders += 1
        assert folders < 10 * KILLS, "it ends too soon to be killed"
    assert len({moment for moment in moments if 0 < moment < 16}) > KILLS // 4, moments


def kill_before_the_end(copy: Path, out: Path, extract: bool, rng: random.Random) -> bool:
    """Kill a call soon after it is done with a few more files; False if it came to its end before."""
    command = [sys.executable, "-c", CHILD, str(copy), str(out), "extract" if extract else ""]
    wanted = files_done(out) + rng.randrange(4)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        child.stdout.readline()
        while files_done(out) < wanted and child.poll() is None:
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.02))
        child.kill()
    return not (out / "manifest.json").exists()


def files_done(out: Path) -> int:
    """How many of the hub's files an unfinished folder is done with; the notes of it go when all is done."""
    with contextlib.suppress(FileNotFoundError):
        return sum(path.suffix == ".parquet" for path in (out / ".parts").rglob("*"))
    return 0


def test_files_that_are_done_are_not_read_again(tmp_path: Path, copy: Path) -> None:
    """Of a packed split, at least: the process is ended in the last file."""
    heard: list[int] = []

    def stop(phase: str, done: int, total: int) -> None:
        if phase == "copying to train.images" and done == total - 1:
            raise KeyboardInterrupt

    def hear(phase: str, done: int, total: int) -> None:
        if phase == "copying to train.images":
            heard.append(done)

    with pytest.raises(KeyboardInterrupt):
        prepare(copy, tmp_path / "out", extract=False, report=stop)
    prepare(copy, tmp_path / "out", extract=False, report=hear)
    assert heard == list(range(27, 40))
