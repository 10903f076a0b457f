"""Extracted images are whole, also after kills, power cuts and full disks, and nothing else is touched."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.data.imagenet.archive_index import build_train_index
from pipelines.data.imagenet.archives import ARCHIVES
from pipelines.data.imagenet.devkit import read_devkit
from pipelines.data.images.extract import extract_images, flush_to_disk
from pipelines.data.images.index import Index
from pipelines.data.images.tar import open_tar
from pipelines.data.progress import Progress
from pipelines.errors import AsgoError

from .archive_makers import Content, noise, tree, write_archives

FIRST = "n10000000"


def unheard(phase: str, done: int, total: int) -> None:
    """A report that nobody hears."""


@dataclass
class Archive:
    """The training images, and how to extract them."""

    content: Content
    path: Path
    index: Index

    def extract(self, target: Path, progress: Progress = unheard) -> None:
        extract_images(self.path, self.index, target, sorted(self.content.train), 2, progress)

    def is_whole_in(self, target: Path) -> bool:
        wanted = {
            f"{wnid}/{name}": each for wnid, images in self.content.train.items() for name, each in images.items()
        }
        return tree(target) == wanted


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    content = noise(classes=5, train=20, validation=1, largest=3000)
    folder = write_archives(tmp_path / "archives", content, kit="map_clsloc.txt")
    path = folder / ARCHIVES["train"].file
    with open_tar(path) as tar:
        index = build_train_index(tar, read_devkit(folder / ARCHIVES["devkit"].file), unheard)
    return Archive(content, path, index)


def test_images_become_files_by_class_and_the_progress_counts_their_bytes(tmp_path: Path, archive: Archive) -> None:
    heard: list[tuple[str, int, int]] = []
    archive.extract(tmp_path / "train", lambda *told: heard.append(told))
    assert archive.is_whole_in(tmp_path / "train")
    total = int(archive.index.sizes.sum())
    assert heard[-1] == ("extracting ILSVRC2012_img_train.tar", total, total)
    flush_to_disk(tmp_path)


def test_what_is_whole_is_kept_and_what_is_not_is_written_again(tmp_path: Path, archive: Archive) -> None:
    target = tmp_path / "train"
    archive.extract(target)
    (target / FIRST).rename(target / f".{FIRST}.partial")  # as a kill leaves it: a file half-written, others not begun
    whole, half, missing = (target / f".{FIRST}.partial" / f"{FIRST}_{number}.JPEG" for number in (0, 1, 2))
    half.write_bytes(half.read_bytes()[:-1])
    missing.unlink()
    kept = whole.stat().st_ino, (target / "n10000017" / "n10000017_3.JPEG").stat().st_ino
    archive.extract(target)
    assert archive.is_whole_in(target)
    assert kept == (
        (target / FIRST / whole.name).stat().st_ino,
        (target / "n10000017" / "n10000017_3.JPEG").stat().st_ino,
    )


def test_a_class_that_lost_a_file_is_completed(tmp_path: Path, archive: Archive) -> None:
    target = tmp_path / "train"
    archive.extract(target)
    (target / FIRST / f"{FIRST}_4.JPEG").unlink()
    (target / "n10000017" / "n10000017_5.JPEG").write_bytes(b"")
    archive.extract(target)
    assert archive.is_whole_in(target)


def test_a_class_folder_appears_only_when_it_is_whole(tmp_path: Path, archive: Archive) -> None:
    target, sizes = tmp_path / "train", {wnid: len(images) for wnid, images in archive.content.train.items()}

    def look(phase: str, done: int, total: int) -> None:
        for folder in target.glob("n*"):
            assert len(list(folder.iterdir())) == sizes[folder.name]

    archive.extract(target, look)


def test_a_report_that_raises_ends_the_work_which_then_goes_on(tmp_path: Path, archive: Archive) -> None:
    def stop(phase: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        archive.extract(tmp_path / "train", stop)
    archive.extract(tmp_path / "train")
    assert archive.is_whole_in(tmp_path / "train")


def test_a_file_that_is_not_of_the_archive_is_named_and_left_alone(tmp_path: Path, archive: Archive) -> None:
    for folder in (FIRST, f".{FIRST}.partial"):
        foreign = tmp_path / folder / "train" / folder / "notes.txt"
        foreign.parent.mkdir(parents=True)
        foreign.write_text("mine")
        with pytest.raises(AsgoError, match=rf"{FIRST}.*/notes\.txt: not part of the archive; remove it"):
            archive.extract(tmp_path / folder / "train")
        assert foreign.read_text() == "mine"


def test_a_link_in_the_way_is_not_written_through(tmp_path: Path, archive: Archive) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine")
    partial = tmp_path / "train" / f".{FIRST}.partial"
    partial.mkdir(parents=True)
    (partial / f"{FIRST}_0.JPEG").symlink_to(outside)
    with pytest.raises(OSError, match=rf"{FIRST}_0\.JPEG"):
        archive.extract(tmp_path / "train")
    assert outside.read_text() == "mine"


def test_a_link_in_the_place_of_a_hidden_folder_is_not_followed(tmp_path: Path, archive: Archive) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / f".{FIRST}.partial").symlink_to(outside)
    archive.extract(tmp_path / "train")
    assert not list(outside.iterdir())
    assert (tmp_path / "train" / FIRST).is_dir()
    assert not (tmp_path / "train" / FIRST).is_symlink()


def test_an_archive_that_is_cut_after_it_was_indexed_is_told(tmp_path: Path, archive: Archive) -> None:
    archive.path.write_bytes(archive.path.read_bytes()[: int(archive.index.offsets[-1])])
    with pytest.raises(AsgoError, match=r"img_train\.tar: ends in n\d+_\d+\.JPEG, so it was truncated"):
        archive.extract(tmp_path / "train")
    assert not (tmp_path / "train" / sorted(archive.content.train)[-1]).exists()


def test_a_full_disk_is_told_with_the_file_and_the_work_goes_on_when_there_is_room(
    archive: Archive, small_disk: Callable[[str], Path]
) -> None:
    disk = small_disk("size=128k")
    with pytest.raises(OSError, match=r"No space left on device: '.*\.JPEG'"):
        archive.extract(disk / "train")
    for folder in (disk / "train").glob("n*"):
        assert {each.name for each in folder.iterdir()} == archive.content.train[folder.name].keys()
    subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
    archive.extract(disk / "train")
    assert archive.is_whole_in(disk / "train")
