"""`prepare_imagenet` ends with a whole folder or says what is wrong, and every ended call goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.data.imagenet.archives import ARCHIVES
from pipelines.data.imagenet.importer import prepare_imagenet
from pipelines.data.images.image_sets import open_images
from pipelines.data.images.manifest import ImageManifest, load_image_manifest
from pipelines.data.progress import Progress
from pipelines.errors import AsgoError, RunInterrupted, UsageError

from .archive_makers import Content, noise, tree, write_archives, write_digests
from .kills import KILLS

CHILD = """
import sys
from pathlib import Path
from pipelines.data.imagenet.importer import prepare_imagenet

def report(phase, done, total):
    print(phase, flush=True)

prepare_imagenet(Path(sys.argv[1]), Path(sys.argv[2]), extract=True, workers=2, report=report)
"""


def unheard(phase: str, done: int, total: int) -> None:
    """A report that nobody hears."""


def prepare(folder: Path, out: Path, *, extract: bool = True, report: Progress = unheard, **more: Any) -> ImageManifest:
    return prepare_imagenet(folder, out, extract=extract, workers=2, report=report, **more)


@pytest.fixture
def content() -> Content:
    return noise(classes=5, train=8, validation=3, largest=2000)


@pytest.fixture
def archives(tmp_path: Path, content: Content) -> Path:
    return write_archives(tmp_path / "archives", content)


def expected_tree(content: Content) -> dict[str, bytes]:
    train = {f"train/{wnid}/{name}": image for wnid in content.train for name, image in content.train[wnid].items()}
    validation = {
        f"val/{wnid}/ILSVRC2012_val_{number:08d}.JPEG": image
        for number, (wnid, image) in enumerate(content.validation, start=1)
    }
    return {**train, **validation}


def images_in(out: Path) -> dict[str, bytes]:
    return {name: each for name, each in tree(out).items() if "/" in name}


def test_extracting_gives_the_images_by_class_and_a_manifest_with_the_counts(
    tmp_path: Path, archives: Path, content: Content
) -> None:
    out = tmp_path / "out"
    manifest = prepare(archives, out)
    assert images_in(out) == expected_tree(content)
    assert sorted(path.name for path in out.iterdir()) == [
        "manifest.json",
        "train",
        "train.parquet",
        "val",
        "val.parquet",
    ]
    assert [(each.id, each.train, each.validation) for each in manifest.classes] == [
        (wnid, 8, 3) for wnid in sorted(content.train)
    ]
    assert manifest == load_image_manifest(out)


def test_without_extracting_only_the_index_is_written_and_the_data_are_the_same(tmp_path: Path, archives: Path) -> None:
    manifest = prepare(archives, tmp_path / "in place", extract=False)
    assert sorted(tree(tmp_path / "in place")) == ["manifest.json", "train.parquet", "val.parquet"]
    extracted = prepare(archives, tmp_path / "extracted")
    assert manifest.fingerprint == extracted.fingerprint
    assert manifest.classes == extracted.classes


def test_the_same_call_again_finds_its_work_done(tmp_path: Path, archives: Path) -> None:
    def never(phase: str, done: int, total: int) -> None:
        raise AssertionError(f"work was done: {phase}")

    manifest = prepare(archives, tmp_path / "out")
    for archive in archives.iterdir():  # they are not needed any more
        archive.unlink()
    assert prepare(archives, tmp_path / "out", report=never) == manifest


def test_other_options_are_refused_by_name_unless_overwriting(tmp_path: Path, archives: Path, content: Content) -> None:
    out = tmp_path / "out"
    prepare(archives, out)
    with pytest.raises(UsageError, match=r"out: complete, made with --extract and not --no-extract; pass the same"):
        prepare(archives, out, extract=False)
    other = write_archives(tmp_path / "others", noise(classes=3, train=2, validation=1, largest=99))
    with pytest.raises(UsageError, match=r"made with --archives .*archives and not --archives .*others; pass"):
        prepare(other, out)
    assert images_in(out) == expected_tree(content)
    prepare(other, out, extract=False, overwrite=True)
    assert sorted(tree(out)) == ["manifest.json", "train.parquet", "val.parquet"]
    assert len(open_images(out).train) == 6


def test_an_overwriting_that_is_ended_goes_on_without_anything_of_the_old(
    tmp_path: Path, archives: Path, content: Content
) -> None:
    """The old images have the sizes of the new ones, so only clearing the folder tells them apart."""
    out = tmp_path / "out"
    altered = {wnid: {name: image[::-1] for name, image in each.items()} for wnid, each in content.train.items()}
    other = write_archives(tmp_path / "others", Content(altered, content.validation, content.numbers))
    prepare(other, out)

    def stop(phase: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(archives, out, overwrite=True, report=stop)
    prepare(archives, out)
    assert images_in(out) == expected_tree(content)


@pytest.mark.parametrize("name", ["notes.txt", "train/n01440764/mine.JPEG"])
def test_a_folder_of_something_else_is_never_overwritten(tmp_path: Path, archives: Path, name: str) -> None:
    mine = tmp_path / "out" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match=r"out: .*so nothing is overwritten; choose another --out$"):
            prepare(archives, tmp_path / "out", overwrite=overwrite)
    assert tree(tmp_path / "out") == {name: b"mine"}


def test_a_file_of_the_users_in_a_finished_folder_is_not_overwritten(tmp_path: Path, archives: Path) -> None:
    prepare(archives, tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    before = tree(tmp_path / "out")
    with pytest.raises(
        UsageError, match=r"out: notes\.txt is not part of a prepared data set, so nothing is overwritten"
    ):
        prepare(archives, tmp_path / "out", overwrite=True)
    assert tree(tmp_path / "out") == before


def test_archives_that_are_not_there_are_named_and_no_folder_is_left(tmp_path: Path, archives: Path) -> None:
    (archives / ARCHIVES["val"].file).unlink()
    (archives / ARCHIVES["devkit"].file).unlink()
    with pytest.raises(UsageError, match=r"archives: no ILSVRC2012_img_val\.tar, no ILSVRC2012_devkit_t12\.tar\.gz;"):
        prepare(archives, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_archives_must_be_the_official_ones_where_no_md5sums_say_otherwise(tmp_path: Path, archives: Path) -> None:
    (archives / "md5sums.txt").unlink()
    with pytest.raises(AsgoError, match=r"img_train\.tar: .* bytes long, not 147,897,477,120"):
        prepare(archives, tmp_path / "out")


def test_archives_are_checked_once_although_the_work_is_ended(tmp_path: Path, archives: Path) -> None:
    heard: list[str] = []

    def stop_at_extraction(phase: str, done: int, total: int) -> None:
        heard.append(phase)
        if phase.startswith("extracting"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(archives, tmp_path / "out", report=stop_at_extraction)
    assert {f"checking {archive.file}" for archive in ARCHIVES.values()} <= set(heard)
    heard.clear()
    prepare(archives, tmp_path / "out", report=lambda phase, done, total: heard.append(phase))
    assert not [phase for phase in heard if phase.startswith(("checking", "indexing"))]


def test_archives_that_the_caller_has_checked_are_not_read_again(tmp_path: Path, archives: Path) -> None:
    heard: list[str] = []
    prepare(
        archives,
        tmp_path / "out",
        checked=["ILSVRC2012_img_train.tar", "ILSVRC2012_devkit_t12.tar.gz"],
        report=lambda phase, done, total: heard.append(phase),
    )
    assert {phase for phase in heard if phase.startswith("checking")} == {"checking ILSVRC2012_img_val.tar"}


def test_an_archive_that_changed_since_the_folder_was_begun_is_refused(
    tmp_path: Path, archives: Path, content: Content
) -> None:
    def stop(phase: str, done: int, total: int) -> None:
        if phase.startswith("extracting"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(archives, tmp_path / "out", report=stop)
    content.train["n10000000"]["n10000000_0.JPEG"] += b"x"
    write_archives(archives, content)
    with pytest.raises(UsageError, match=r"img_train\.tar: has changed since .*out was started; pass --overwrite"):
        prepare(archives, tmp_path / "out")


def cut(archives: Path) -> None:
    path = archives / ARCHIVES["train"].file
    path.write_bytes(path.read_bytes()[:20_000])


def no_tar(archives: Path) -> None:
    (archives / ARCHIVES["val"].file).write_bytes(b"<html>not found</html>" * 100)


def empty(archives: Path) -> None:
    (archives / ARCHIVES["train"].file).write_bytes(b"")


SPOILED: dict[Callable[[Path], None], str] = {
    cut: r"img_train\.tar: .*truncated",
    no_tar: r"img_val\.tar: not a tar archive",
    empty: r"img_train\.tar: .*",
}


@pytest.mark.parametrize(("spoil", "problem"), SPOILED.items(), ids=[each.__name__ for each in SPOILED])
def test_a_bad_archive_is_one_line_and_leaves_no_image(
    tmp_path: Path, archives: Path, spoil: Callable[[Path], None], problem: str
) -> None:
    spoil(archives)
    with pytest.raises(AsgoError, match=r"its MD5 is"):
        prepare(archives, tmp_path / "out")
    write_digests(archives)
    before = tree(tmp_path)
    with pytest.raises(AsgoError, match=problem) as caught:
        prepare(archives, tmp_path / "out", overwrite=True)
    assert "\n" not in str(caught.value)
    assert {name for name in tree(tmp_path).keys() ^ before.keys() if not name.startswith("out/")} == set()
    assert images_in(tmp_path / "out") == {}


def test_a_disk_too_small_is_refused_before_anything_is_extracted(
    archives: Path, small_disk: Callable[[str], Path]
) -> None:
    disk = small_disk("size=128k")
    with pytest.raises(AsgoError, match=r"the images take .* GB and .* GB are free; free some space, or read them"):
        prepare(archives, disk / "out")
    assert images_in(disk / "out") == {}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["checking", "indexing", "extracting", "waiting"])
def test_a_signal_at_any_time_interrupts_and_the_same_call_goes_on(
    tmp_path: Path, archives: Path, content: Content, moment: str, number: int
) -> None:
    def send(phase: str, done: int, total: int) -> None:
        if phase.startswith(moment):
            os.kill(os.getpid(), number)

    with pytest.raises(RunInterrupted, match=rf"SIG\w+ while {moment}.*; run the same command again"):
        prepare(archives, tmp_path / "out", report=send)
    with pytest.raises(AsgoError, match=r"out: incomplete; resume with: asgo data imagenet --archives .* --out .*out"):
        open_images(tmp_path / "out")
    prepare(archives, tmp_path / "out")
    assert images_in(tmp_path / "out") == expected_tree(content)


def test_killed_again_and_again_it_ends_with_the_same_folder(tmp_path: Path) -> None:
    content = noise(classes=40, train=60, validation=5, largest=4000)
    archives = write_archives(tmp_path / "archives", content, kit="map_clsloc.txt")
    undisturbed = prepare(archives, tmp_path / "undisturbed"), tree(tmp_path / "undisturbed")
    rng, kills, partly, folders = random.Random(KILLS), 0, 0, 0
    while kills < KILLS:
        out = tmp_path / f"out{folders}"
        while kills < KILLS and kill_while_extracting(archives, out, rng.uniform(0, 0.05)):
            kills += 1
            partly += 0 < len(images_in(out)) < len(expected_tree(content))
            with pytest.raises(AsgoError, match="incomplete; resume with"):
                open_images(out)
        assert (prepare(archives, out), tree(out)) == undisturbed
        folders += 1
        assert folders < 10 * KILLS, "it ends too soon to be killed"
    assert partly > KILLS // 4  # or the kills came at moments that prove nothing


def kill_while_extracting(archives: Path, out: Path, delay: float) -> bool:
    """Kill a call so many seconds after it began to extract; False if it made the folder complete before."""
    command = [sys.executable, "-c", CHILD, str(archives), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("extracting"):
                break
        time.sleep(delay)
        child.kill()
    return not (out / "manifest.json").exists()


def test_two_at_once_in_one_folder_are_refused(tmp_path: Path, archives: Path) -> None:
    def again(phase: str, done: int, total: int) -> None:
        with pytest.raises(UsageError, match="another process is preparing data in this folder"):
            prepare(archives, tmp_path / "out")

    prepare(archives, tmp_path / "out", report=again)


@pytest.mark.parametrize("name", ["manifest.json", "unfinished.json"])
def test_a_folder_of_an_earlier_version_is_refused_in_one_line_and_may_be_overwritten(
    tmp_path: Path, archives: Path, content: Content, name: str
) -> None:
    out = tmp_path / "out"
    prepare(archives, out)
    (out / "manifest.json").unlink()
    (out / name).write_text('{"format_version": 1, "kind": "imagenet", "recipe": {}}')
    told = rf"out/{name}: made by an earlier version of asgo; make the folder again with --overwrite$"
    with pytest.raises(AsgoError, match=told):
        open_images(out)
    with pytest.raises(AsgoError, match=told):
        prepare(archives, out)
    prepare(archives, out, overwrite=True)
    assert images_in(out) == expected_tree(content)


def test_an_unfinished_folder_of_other_data_is_left_alone(tmp_path: Path, archives: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "unfinished.json").write_text('{"format_version": 1, "recipe": {}}')
    before = tree(tmp_path / "out")
    with pytest.raises(AsgoError, match=r"unfinished\.json: damaged, or not for images; choose another folder"):
        prepare(archives, tmp_path / "out")
    with pytest.raises(UsageError, match=r"`asgo data imagenet` did not create this folder, so nothing is overwritten"):
        prepare(archives, tmp_path / "out", overwrite=True)
    assert tree(tmp_path / "out") == before


def test_a_manifest_that_was_altered_is_told(tmp_path: Path, archives: Path) -> None:
    out = tmp_path / "out"
    prepare(archives, out)
    path = out / "manifest.json"
    whole = path.read_text()
    path.write_text(whole.replace('"train": 8', '"train": 9', 1))
    with pytest.raises(AsgoError, match=r"manifest\.json: altered since it was written"):
        load_image_manifest(out)
    path.write_text(json.dumps({**json.loads(whole), "kind": "tokens"}))
    with pytest.raises(AsgoError, match=r"out: the data is not images"):
        load_image_manifest(out)
    for broken in ("", "[]", "{}", whole[:-9], whole.replace('"layout"', '"layouts"')):
        path.write_text(broken)
        with pytest.raises(AsgoError, match=r"manifest\.json: damaged|the data is not images"):
            load_image_manifest(out)
