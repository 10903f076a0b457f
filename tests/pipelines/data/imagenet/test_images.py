"""The images of both layouts are the same, in the same order, from any thread and process."""

from __future__ import annotations

import multiprocessing
import shutil
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder

from pipelines.data.imagenet.archives import ARCHIVES
from pipelines.data.imagenet.importer import prepare_imagenet
from pipelines.data.images.image_sets import ImageData, ImageSet, open_images
from pipelines.errors import AsgoError, UsageError

from .archive_makers import CLASSES, Content, pictures, write_archives

LAYOUTS = ["extracted", "archives"]


def unheard(phase: str, done: int, total: int) -> None:
    """A report that nobody hears."""


@pytest.fixture
def content() -> Content:
    return pictures(classes=4, train=5, validation=3)


@pytest.fixture
def archives(tmp_path: Path, content: Content) -> Path:
    return write_archives(tmp_path / "moved" / "archives", content)


def make(archives: Path, out: Path, layout: str) -> ImageData:
    prepare_imagenet(archives, out, extract=layout == "extracted", report=unheard)
    return open_images(out)


def everything(images: ImageSet) -> list[tuple[str, int, bytes]]:
    return [(images.name(index), int(images.labels[index]), images.read(index)) for index in range(len(images))]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_names_and_labels_are_those_of_the_archives(
    tmp_path: Path, archives: Path, content: Content, layout: str
) -> None:
    data = make(archives, tmp_path / "out", layout)
    wnids = sorted(content.train)
    assert [(each.id, each.name) for each in data.classes] == [(wnid, CLASSES[wnid]) for wnid in wnids]
    assert everything(data.train) == [
        (f"{wnid}/{name}", label, content.train[wnid][name])
        for label, wnid in enumerate(wnids)
        for name in sorted(content.train[wnid])
    ]
    assert everything(data.validation) == [
        (f"{wnid}/ILSVRC2012_val_{number:08d}.JPEG", wnids.index(wnid), image)
        for number, (wnid, image) in enumerate(content.validation, start=1)
    ]


def test_both_layouts_have_one_fingerprint(tmp_path: Path, archives: Path) -> None:
    first, second = (make(archives, tmp_path / layout, layout) for layout in LAYOUTS)
    assert first.fingerprint == second.fingerprint


def test_torchvision_reads_the_extracted_folder_with_the_same_labels(tmp_path: Path, archives: Path) -> None:
    data = make(archives, tmp_path / "out", "extracted")
    peer = ImageFolder(str(tmp_path / "out" / "train"))
    ours = [(str(tmp_path / "out" / "train" / name), label) for name, label, _ in everything(data.train)]
    assert ours == peer.samples
    found = {(Path(path).name, label) for path, label in ImageFolder(str(tmp_path / "out" / "val")).samples}
    assert found == {(Path(name).name, label) for name, label, _ in everything(data.validation)}


def _read_elsewhere(images: ImageSet) -> list[tuple[str, int, bytes]]:
    return everything(images)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sets_can_be_sent_to_other_processes_after_they_were_read(tmp_path: Path, archives: Path, layout: str) -> None:
    data = make(archives, tmp_path / "out", layout)
    wanted = everything(data.train)
    again = ForkingPickler.loads(ForkingPickler.dumps(data.train))  # how a spawned process gets it
    assert everything(again) == wanted
    del again  # which closes its own file, and no other
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_read_elsewhere, (data.train,)) == wanted
    assert everything(data.train) == wanted


@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_may_read_at_once(tmp_path: Path, archives: Path, layout: str) -> None:
    train = make(archives, tmp_path / "out", layout).train
    wanted = [train.read(index) for index in range(len(train))]
    fresh = open_images(tmp_path / "out").train
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(fresh.read, list(range(len(train))) * 20)) == wanted * 20


def test_folders_that_are_none_are_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere: no such data folder"):
        open_images(tmp_path / "nowhere")
    with pytest.raises(
        AsgoError, match=r"no manifest\.json, so `asgo data` did not make this folder; .*with: asgo data images "
    ):
        open_images(tmp_path)


def test_archives_that_are_gone_or_changed_are_named_with_the_way_out(tmp_path: Path, archives: Path) -> None:
    make(archives, tmp_path / "out", "archives")
    shutil.move(archives.parent, tmp_path / "elsewhere")
    with pytest.raises(
        AsgoError,
        match=r"img_train\.tar: missing; restore it, .*--archives FOLDER .*--no-extract --overwrite",
    ):
        open_images(tmp_path / "out")
    there = tmp_path / "elsewhere" / "archives"
    prepare_imagenet(there, tmp_path / "out", extract=False, overwrite=True, report=unheard)
    open_images(tmp_path / "out")
    with (there / ARCHIVES["val"].file).open("ab") as file:
        file.write(b"x")
    with pytest.raises(AsgoError, match=r"img_val\.tar: [\d,]+ bytes long, not [\d,]+; restore it"):
        open_images(tmp_path / "out")


def test_an_archive_that_is_cut_while_it_is_open_is_told_with_the_image(tmp_path: Path, archives: Path) -> None:
    train = make(archives, tmp_path / "out", "archives").train
    path = archives / ARCHIVES["train"].file
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(AsgoError, match=r"img_train\.tar: ends in n\d+/n\d+_\d+\.JPEG; it was truncated"):
        train.read(len(train) - 1)


def test_extracted_images_that_are_gone_or_cut_are_named(tmp_path: Path, archives: Path) -> None:
    data = make(archives, tmp_path / "out", "extracted")
    path = tmp_path / "out" / "train" / data.train.name(3)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(AsgoError, match=rf"{path.name}: no longer [\d,]+ bytes, as when it was extracted"):
        data.train.read(3)
    path.unlink()
    with pytest.raises(AsgoError, match=rf"{path.name}: No such file"):
        data.train.read(3)
    shutil.rmtree(path.parent)
    with pytest.raises(AsgoError, match=rf"{path.parent.name}: missing; make the data folder again"):
        open_images(tmp_path / "out")


def test_an_index_that_is_not_the_manifests_own_is_refused(tmp_path: Path, archives: Path, content: Content) -> None:
    make(archives, tmp_path / "out", "archives")
    content.train["n01440764"]["other.JPEG"] = b"other"
    make(write_archives(tmp_path / "others", content), tmp_path / "out2", "archives")
    shutil.copy(tmp_path / "out2" / "train.parquet", tmp_path / "out" / "train.parquet")
    with pytest.raises(AsgoError, match=r"train\.parquet: altered since it was written"):
        open_images(tmp_path / "out")
