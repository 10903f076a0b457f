"""Labels count as the development kit counts, from either of its tables."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import pytest
import torch
from torchvision.datasets import imagenet

from pipelines.data.imagenet.archives import ARCHIVES, expected_archives
from pipelines.data.imagenet.devkit import read_devkit
from pipelines.data.images.index import ImageClass
from pipelines.errors import AsgoError

from .archive_makers import CLASSES, Content, class_map, kit_files, noise, pictures, tar_bytes, write_archives


@pytest.fixture(scope="module")
def content() -> Content:
    return pictures(classes=10, train=1, validation=3, size=(8, 8))


def write_kit(folder: Path, files: dict[str, bytes]) -> Path:
    path = folder / ARCHIVES["devkit"].file
    path.write_bytes(gzip.compress(tar_bytes(files)))
    return path


@pytest.mark.parametrize("kit", ["meta.mat", "map_clsloc.txt"])
def test_classes_are_sorted_and_validation_labels_follow_the_kits_own_numbers(
    tmp_path: Path, content: Content, kit: str
) -> None:
    labels = read_devkit(write_kit(tmp_path, kit_files(content, kit)))
    assert labels.classes == tuple(ImageClass(wnid, name) for wnid, name in CLASSES.items())
    assert labels.validation == tuple(wnid for wnid, _ in content.validation)
    by_number = sorted(content.numbers, key=lambda wnid: content.numbers[wnid])
    assert by_number != sorted(by_number)  # or this test would not tell the two orders apart


def test_torchvision_reads_the_same_labels(tmp_path: Path, content: Content, monkeypatch: pytest.MonkeyPatch) -> None:
    write_archives(tmp_path, content)
    kit = expected_archives(tmp_path)["devkit"]
    monkeypatch.setitem(imagenet.ARCHIVE_META, "devkit", (kit.file, kit.md5))
    imagenet.parse_devkit_archive(tmp_path)
    _, validation = torch.load(tmp_path / imagenet.META_FILE, weights_only=True)
    assert tuple(validation) == read_devkit(tmp_path / kit.file).validation


def test_a_table_beside_the_kit_serves_without_its_matrix(
    tmp_path: Path, content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_kit(tmp_path, kit_files(content, "meta.mat"))
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    (tmp_path / "map_clsloc.txt").write_text(class_map(content.numbers))
    assert read_devkit(path).validation == tuple(wnid for wnid, _ in content.validation)


def test_nothing_of_the_kit_is_written_to_the_disk(tmp_path: Path, content: Content) -> None:
    files = kit_files(content, "meta.mat")
    path = write_kit(tmp_path, {**files, "../outside.txt": b"x", "/tmp/outside.txt": b"x"})
    read_devkit(path)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_a_kit_without_a_part_is_told(tmp_path: Path, content: Content) -> None:
    with pytest.raises(AsgoError, match=r"t12\.tar\.gz: holds neither meta\.mat nor map_clsloc\.txt"):
        read_devkit(write_kit(tmp_path, kit_files(content, "")))
    files = kit_files(content, "map_clsloc.txt")
    del files["ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"]
    with pytest.raises(AsgoError, match=r"t12\.tar\.gz: holds no ILSVRC2012_validation_ground_truth\.txt"):
        read_devkit(write_kit(tmp_path, files))


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ("n02119789 1 kit_fox\nn02100735\n", "line 2 is not a WordNet id, a number and a name"),
        ("n02119789 1 kit_fox\nn02100735 1 setter\n", "a class or a number occurs twice"),
        ("n02119789 1 kit_fox\nn02119789 2 kit_fox\n", "a class or a number occurs twice"),
        ("", "there are none"),
    ],
)
def test_a_malformed_table_is_told(tmp_path: Path, content: Content, table: str, problem: str) -> None:
    files = kit_files(content, "")
    files["data/map_clsloc.txt"] = table.encode()
    with pytest.raises(AsgoError, match=rf"t12\.tar\.gz: map_clsloc\.txt: .*{problem}"):
        read_devkit(write_kit(tmp_path, files))


def test_labels_of_unknown_classes_are_told_with_their_line(tmp_path: Path, content: Content) -> None:
    for truth in (b"1\n11\n", b"1\nx\n", b"1\n-1\n"):
        files = kit_files(content, "map_clsloc.txt")
        files["ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"] = truth
        with pytest.raises(AsgoError, match=r"line 2 is '.+', not the number of a class"):
            read_devkit(write_kit(tmp_path, files))


def test_a_kit_that_is_damaged_or_none_is_told_in_one_line(tmp_path: Path) -> None:
    path = write_kit(tmp_path, kit_files(noise(3, 1, 1, 9), "meta.mat"))
    whole = path.read_bytes()
    for content in (b"", b"not a tar", whole[: len(whole) // 2], gzip.compress(b"not a tar")):
        path.write_bytes(content)
        with pytest.raises(AsgoError, match=r"t12\.tar\.gz: not a whole tar\.gz archive") as caught:
            read_devkit(path)
        assert "\n" not in str(caught.value)


def test_a_damaged_meta_mat_is_told(tmp_path: Path, content: Content) -> None:
    files = kit_files(content, "meta.mat")
    for broken in (b"", b"MATLAB" * 100, files["ILSVRC2012_devkit_t12/data/meta.mat"][:300]):
        files["ILSVRC2012_devkit_t12/data/meta.mat"] = broken
        with pytest.raises(AsgoError, match=r"meta\.mat cannot be read"):
            read_devkit(write_kit(tmp_path, files))
