"""Folders of ImageNet with a manifest of version 2, as an earlier version of asgo wrote them, are read as before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipelines.data.imagenet.archives import ARCHIVES
from pipelines.data.imagenet.importer import prepare_imagenet
from pipelines.data.images.image_sets import open_images
from pipelines.data.images.manifest import load_image_manifest
from pipelines.data.images.verify import verify_images
from pipelines.data.manifest import sealed_json
from pipelines.errors import AsgoError
from tests.pipelines.data.imagenet.archive_makers import Content, noise, tree, write_archives, write_digests

STORED = Path(__file__).parent / "version_2"
FINGERPRINT = "b697806314bbd7513b17ca625f33a9f00fe7b06ad032dfae562cc05c593c4553"


@pytest.fixture
def content() -> Content:
    """The images that were stored."""
    return noise(classes=2, train=2, validation=1, largest=40)


@pytest.fixture
def archives(tmp_path: Path, content: Content) -> Path:
    """The archives that they came from; of the development kit, whose bytes tell the time, the file that was stored."""
    folder = write_archives(tmp_path / "archives", content, kit="map_clsloc.txt").resolve()
    shutil.copy(STORED / ARCHIVES["devkit"].file, folder)
    write_digests(folder)
    return folder


def unheard(phase: str, done: int, total: int) -> None:
    """A report that nobody hears."""


def with_archives(folder: Path, archives: Path) -> Path:
    """The stored folder of images left in the archives, which are now elsewhere."""
    shutil.copytree(STORED / "in_place", folder)
    fields = json.loads((folder / "manifest.json").read_text())
    del fields["manifest_sha256"]
    (folder / "manifest.json").write_bytes(sealed_json({**fields, "archives_folder": str(archives)}))
    return folder


@pytest.mark.parametrize("layout", ["extracted", "in_place", "packed"])
def test_the_images_of_every_layout_are_read_and_verified(
    tmp_path: Path, content: Content, archives: Path, layout: str
) -> None:
    folder = STORED / layout
    if layout == "in_place":
        folder = with_archives(tmp_path / "in_place", archives)
    data = open_images(folder)
    assert data.fingerprint == FINGERPRINT
    assert [(each.id, each.name) for each in data.classes] == [(wnid, wnid) for wnid in sorted(content.train)]
    assert {data.train.name(at): data.train.read(at) for at in range(len(data.train))} == {
        f"{wnid}/{name}": image for wnid, images in content.train.items() for name, image in images.items()
    }
    assert [data.validation.read(at) for at in range(len(data.validation))] == [each for _, each in content.validation]
    assert verify_images(folder, unheard) == []


def test_a_finished_folder_is_complete_for_the_command_that_made_it(tmp_path: Path, archives: Path) -> None:
    folder = with_archives(tmp_path / "out", archives)
    before = tree(folder)
    assert prepare_imagenet(archives, folder, extract=False, report=unheard) == load_image_manifest(folder)
    assert tree(folder) == before


def test_an_altered_manifest_is_told(tmp_path: Path) -> None:
    shutil.copytree(STORED / "packed", tmp_path / "packed")
    path = tmp_path / "packed" / "manifest.json"
    path.write_text(path.read_text().replace('"train": 2', '"train": 3', 1))
    with pytest.raises(AsgoError, match=r"manifest\.json: altered since it was written"):
        load_image_manifest(tmp_path / "packed")


def test_an_unfinished_folder_is_resumed(tmp_path: Path, archives: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(STORED / "unfinished", out)
    with pytest.raises(AsgoError, match=r"resume with: asgo data imagenet --archives /data/archives --out .*out$"):
        load_image_manifest(out)
    state = out / "unfinished.json"
    state.write_text(state.read_text().replace("/data/archives", str(archives)))
    index = (out / "train.parquet").read_bytes()
    assert prepare_imagenet(archives, out, extract=True, report=unheard).fingerprint == FINGERPRINT
    assert (out / "train.parquet").read_bytes() == index
    assert verify_images(out, unheard) == []
