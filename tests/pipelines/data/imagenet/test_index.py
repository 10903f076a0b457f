"""The index holds every image of the kit's classes, in one order, and no others."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest

from pipelines.data.imagenet.archive_index import build_train_index, build_validation_index
from pipelines.data.imagenet.archives import ARCHIVES
from pipelines.data.imagenet.devkit import Labels, read_devkit
from pipelines.data.images.index import (
    Index,
    fingerprint,
    read_index,
    write_index,
)
from pipelines.data.images.tar import open_tar
from pipelines.errors import AsgoError

from .archive_makers import Content, noise, tar_bytes, write_archives


def unheard(phase: str, done: int, total: int) -> None:
    """A report that nobody hears."""


def build(folder: Path, labels: Labels | None = None) -> tuple[Index, Index]:
    labels = labels or read_devkit(folder / ARCHIVES["devkit"].file)
    with open_tar(folder / ARCHIVES["train"].file) as train, open_tar(folder / ARCHIVES["val"].file) as val:
        return build_train_index(train, labels, unheard), build_validation_index(val, labels, unheard)


def wnids(content: Content) -> list[str]:
    return sorted(content.train)


def test_images_are_in_order_whatever_the_order_of_the_archives(tmp_path: Path) -> None:
    content = noise(classes=4, train=12, validation=3, largest=600)
    backwards = Content(
        {wnid: dict(reversed(content.train[wnid].items())) for wnid in reversed(content.train)},
        content.validation,
        content.numbers,
    )
    folder = write_archives(tmp_path / "a", backwards, kit="map_clsloc.txt")
    train, validation = build(folder)
    keys = [(wnids(content)[label], name.decode()) for label, name in zip(train.labels, train.names, strict=True)]
    assert keys == sorted((wnid, name) for wnid, images in content.train.items() for name in images)
    whole = (folder / ARCHIVES["train"].file).read_bytes()
    for (wnid, name), offset, size in zip(keys, train.offsets, train.sizes, strict=True):
        assert whole[offset : offset + size] == content.train[wnid][name]
    assert [wnids(content)[label] for label in validation.labels] == [wnid for wnid, _ in content.validation]
    assert validation.names.tolist() == sorted(validation.names.tolist())
    forwards = build(write_archives(tmp_path / "b", content, kit="map_clsloc.txt"))
    assert fingerprint(wnids(content), forwards) == fingerprint(wnids(content), (train, validation))


def test_the_fingerprint_changes_with_a_name_a_size_or_a_label(tmp_path: Path) -> None:
    content = noise(classes=3, train=2, validation=2, largest=600)
    seen = set()
    for change in ("none", "name", "size", "label"):
        wnid = next(iter(content.train))
        if change == "name":
            content.train[wnid]["other.JPEG"] = content.train[wnid].pop(f"{wnid}_1.JPEG")
        elif change == "size":
            content.train[wnid][f"{wnid}_0.JPEG"] += b"x"
        elif change == "label":
            content.validation[0] = ("n10000034", content.validation[0][1])
        found = build(write_archives(tmp_path / change, content, kit="map_clsloc.txt"))
        seen.add(fingerprint(wnids(content), found))
    assert len(seen) == 4


def test_what_is_written_is_read_and_has_plain_columns(tmp_path: Path) -> None:
    from pyarrow import parquet

    content = noise(classes=3, train=5, validation=1, largest=600)
    train, _ = build(write_archives(tmp_path / "a", content, kit="map_clsloc.txt"))
    path = tmp_path / "train.parquet"
    write_index(path, train, wnids(content))
    again = read_index(path, wnids(content))
    for name in ("labels", "names", "offsets", "sizes"):
        np.testing.assert_array_equal(getattr(again, name), getattr(train, name))
    row = parquet.read_table(path).to_pylist()[7]
    assert list(row) == ["class", "name", "offset", "size"]
    assert (row["class"], row["name"]) == ("n10000017", "n10000017_2.JPEG")


def test_an_index_that_is_damaged_altered_or_gone_is_named(tmp_path: Path) -> None:
    content = noise(classes=3, train=5, validation=1, largest=600)
    train, _ = build(write_archives(tmp_path / "a", content, kit="map_clsloc.txt"))
    path = tmp_path / "train.parquet"
    write_index(path, train, wnids(content))
    with pytest.raises(AsgoError, match=r"train\.parquet: altered since it was written"):
        read_index(path, wnids(content), sha256="0" * 64)
    with pytest.raises(AsgoError, match=r"train\.parquet: has classes that are not in the labels"):
        read_index(path, wnids(content)[1:])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(AsgoError, match=r"train\.parquet: damaged"):
        read_index(path, wnids(content))
    path.unlink()
    with pytest.raises(AsgoError, match=r"train\.parquet: No such file"):
        read_index(path, wnids(content))


def spoil_no_class(content: Content) -> None:
    del content.train["n10000017"]


def spoil_more_classes(content: Content) -> None:
    content.train["n99999999"] = {"a.JPEG": b"x"}


def spoil_empty_class(content: Content) -> None:
    content.train["n10000017"] = {}


def spoil_no_image(content: Content) -> None:
    content.train["n10000017"]["Thumbs.db"] = b"x"


SPOILED = {
    spoil_no_class: r"img_train\.tar: the class archive n10000017\.tar is missing",
    spoil_more_classes: r"img_train\.tar: the development kit has no class archive n99999999\.tar",
    spoil_empty_class: r"img_train\.tar: n10000017\.tar: holds no images",
    spoil_no_image: r"img_train\.tar: n10000017\.tar: the name of member Thumbs\.db is not that of an image",
}


@pytest.mark.parametrize(("spoil", "problem"), SPOILED.items(), ids=[each.__name__ for each in SPOILED])
def test_a_class_too_many_or_too_few_is_told(tmp_path: Path, spoil: object, problem: str) -> None:
    content = noise(classes=3, train=2, validation=1, largest=600)
    labels = read_devkit(write_archives(tmp_path / "a", content, kit="map_clsloc.txt") / ARCHIVES["devkit"].file)
    assert callable(spoil)
    spoil(content)
    with pytest.raises(AsgoError, match=problem):
        build(write_archives(tmp_path / "a", content, kit="map_clsloc.txt"), labels)


def test_a_class_archive_that_is_none_is_named(tmp_path: Path) -> None:
    folder = write_archives(tmp_path / "a", noise(3, 2, 1, 600), kit="map_clsloc.txt")
    files = {f"n{10_000_000 + 17 * label:08d}.tar": b"no archive" * 99 for label in range(3)}
    (folder / ARCHIVES["train"].file).write_bytes(tar_bytes(files))
    with pytest.raises(AsgoError, match=r"img_train\.tar: n10000000\.tar: not a tar archive"):
        build(folder)


def test_a_validation_image_too_many_or_too_few_is_told(tmp_path: Path) -> None:
    content = noise(classes=3, train=2, validation=1, largest=600)
    folder = write_archives(tmp_path / "a", content, kit="map_clsloc.txt")
    labels = read_devkit(folder / ARCHIVES["devkit"].file)
    removed = content.validation.pop()
    write_archives(folder, content, kit="map_clsloc.txt")
    with pytest.raises(AsgoError, match=r"img_val\.tar: the image ILSVRC2012_val_00000003\.JPEG is missing"):
        build(folder, labels)
    content.validation += [removed, removed]
    write_archives(folder, content, kit="map_clsloc.txt")
    with pytest.raises(
        AsgoError, match=r"img_val\.tar: the development kit has no image ILSVRC2012_val_00000004\.JPEG"
    ):
        build(folder, labels)


def test_a_hostile_member_of_a_class_archive_is_named_with_its_archive(tmp_path: Path) -> None:
    content = noise(classes=3, train=2, validation=1, largest=600)
    folder = write_archives(tmp_path / "a", content, kit="map_clsloc.txt")
    link = tarfile.TarInfo("a.JPEG")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    files = {f"{wnid}.tar": tar_bytes(images, more=[link]) for wnid, images in content.train.items()}
    (folder / ARCHIVES["train"].file).write_bytes(tar_bytes(files))
    with pytest.raises(AsgoError, match=r"img_train\.tar: n10000000\.tar: member 'a\.JPEG' is a symbolic link"):
        build(folder)


def test_notes_of_macos_are_skipped_and_counted(tmp_path: Path) -> None:
    content = noise(classes=2, train=3, validation=2, largest=100)
    plain = build(write_archives(tmp_path / "plain", content, kit="map_clsloc.txt"))
    for wnid, images in content.train.items():
        content.train[wnid] = {f"._{name}": b"a note" for name in images} | dict(images)
    folder = write_archives(tmp_path / "noted", content, kit="map_clsloc.txt")
    phases: list[str] = []
    with open_tar(folder / ARCHIVES["train"].file) as tar:
        train = build_train_index(
            tar, read_devkit(folder / ARCHIVES["devkit"].file), lambda phase, done, total: phases.append(phase)
        )
    assert train.names.tolist() == plain[0].names.tolist()
    assert phases[-1].startswith("skipping 6 metadata files of macOS, such as ._")
