"""`asgo data images` as typed, and what the other commands say of its folders and of plain folders of images."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.data.images.image_sets import open_images
from tests.command_lines import asgo
from tests.pipelines.data.image_sources.image_makers import picture, split_files, write_folder, write_tar
from tests.pipelines.data.image_sources.pixel_makers import arrays, write_mnist

LARGE = (80, 60)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "my photos", split_files(size=LARGE))


def test_a_folder_of_images_becomes_a_data_folder(photos: Path, tmp_path: Path):
    done = asgo("data", "images", photos, "--out", "pets", folder=tmp_path)
    assert done.code == 0, done.err
    assert "pets (in pets/*.images)" in done.out
    assert "next: asgo train images --data pets" in done.err
    again = asgo("data", "images", photos, "--out", "pets", folder=tmp_path)
    assert (again.code, again.out) == (0, done.out)
    assert asgo("data", "images", photos, "--out", "pets", "--extract", folder=tmp_path).code == 2
    assert asgo("data", "images", photos, "--out", "pets", "--extract", "--overwrite", folder=tmp_path).code == 0
    assert (tmp_path / "pets" / "train" / "cat" / "0.png").read_bytes() == (photos / "train/cat/0.png").read_bytes()


def test_info_and_verify_speak_of_images(photos: Path, tmp_path: Path):
    write_mnist(tmp_path / "MNIST" / "raw", arrays(40, (28, 28, 1)), arrays(20, (28, 28, 1), seed=1))
    archive = write_tar(tmp_path / "pets.tar", split_files(size=LARGE))
    for source, words in (
        (photos, "in train.images and val.images"),
        (archive, "left in pets.tar"),
        ("torchvision:MNIST", "pixels in train.images and val.images, 28 x 28, grey"),
    ):
        root = ("--root", ".") if source == "torchvision:MNIST" else ()
        made = asgo("data", "images", source, *root, "--out", "made", "--overwrite", folder=tmp_path)
        assert made.code == 0, made.err
        told = asgo("data", "info", "made", "--contact-sheet", "sheet.png", folder=tmp_path)
        assert told.code == 0, told.err
        assert words in told.out
        assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "sheet.png").unlink()
        checked = asgo("data", "verify", "made", folder=tmp_path)
        assert checked.code == 0
        for each in (made, told, checked):
            assert "ImageNet" not in each.out + each.err
            assert "next: asgo train images --data made" in each.err
    classes = json.loads(asgo("data", "info", "made", "--json", folder=tmp_path).out)["classes"]
    assert [each["name"] for each in classes][:2] == ["0 - zero", "1 - one"]


def test_verify_finds_an_altered_pixel_and_an_altered_archive(tmp_path: Path):
    archive = write_tar(tmp_path / "pets.tar", split_files(size=LARGE))
    write_folder(tmp_path / "small", split_files())
    assert asgo("data", "images", archive, "--out", tmp_path / "in place").code == 0
    assert asgo("data", "images", tmp_path / "small", "--out", tmp_path / "decoded").code == 0
    for path in (archive, tmp_path / "decoded" / "val.images"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    told = asgo("data", "verify", tmp_path / "in place")
    assert (told.code, told.out) == (1, f"{archive}: altered: its SHA256 is not the one in the manifest\n")
    told = asgo("data", "verify", tmp_path / "decoded")
    assert (told.code, told.out) == (1, "val.images: altered between byte 0 and byte 4,608\n")


def test_a_plain_folder_is_answered_with_the_command_that_imports_it(photos: Path, tmp_path: Path):
    small = ["--model", "squeezenet1_1", "--steps", "1", "--device", "cpu", "--workers", "1"]
    for words in (
        ["train", "imagenet", "--data", photos, "--out", tmp_path / "run", *small],
        ["data", "imagenet", "--archives", photos, "--out", tmp_path / "out"],
    ):
        refused = asgo(*words, folder=tmp_path)
        assert refused.code != 0
        line = refused.err.splitlines()[-1]
        assert line.startswith("error: ")
        assert f"asgo data images '{photos}' --out " in line
    archive = write_tar(tmp_path / "pets.tar", split_files())
    refused = asgo("train", "imagenet", "--data", archive, "--out", tmp_path / "run", *small)
    assert refused.err.endswith(f"import it with: asgo data images {archive} --out data/pets\n")
    (tmp_path / "ILSVRC").mkdir()
    assert "it holds Kaggle's layout" in asgo("data", "imagenet", "--archives", tmp_path, "--out", tmp_path / "out").err


def test_a_folder_becomes_an_imagenet_too(photos: Path, tmp_path: Path):
    done = asgo("data", "imagenet", "--source", "folder", "--archives", photos, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert (tmp_path / "out" / "train" / "dog" / "3.png").is_file()
    refused = asgo("data", "imagenet", "--source", "folder", "--archives", photos, "--download")
    assert (refused.code, "--download: not for a folder" in refused.err) == (2, True)


def test_bad_sources_end_in_one_line(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for source, code, words in (
        ("nowhere", 2, "no such folder or archive"),
        ("empty", 2, "no folders of classes"),
        ("torchvision:Nope", 2, "unknown data set"),
        ("torchvision:MNIST", 2, "no train-images-idx3-ubyte.gz"),
        ("hub:mnist", 2, "should be hub:OWNER/NAME"),
        ("hub:me/pets", 2, "no Parquet files"),
    ):
        refused = asgo("data", "images", source, "--out", "out", folder=tmp_path)
        lines = refused.err.splitlines()
        assert (refused.code, len(lines)) == (code, 1), refused.err
        assert lines[0].startswith("error: ")
        assert words in lines[0]
        assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_the_output_is_refused_before_the_images_are_checked(photos: Path, tmp_path: Path):
    (photos / "train" / "cat" / "0.png").write_bytes(b"")
    write_folder(tmp_path / "mine", {"notes.txt": b"mine"})
    for extra in ((), ("--overwrite",)):
        refused = asgo("data", "images", photos, "--out", "mine", *extra, folder=tmp_path)
        assert (refused.code, refused.err) == (
            2,
            "error: mine: notes.txt is not part of a prepared data set, so nothing is overwritten; "
            "choose another --out\n",
        )
    (tmp_path / "file").write_bytes(b"")
    refused = asgo("data", "images", photos, "--out", "file/out", folder=tmp_path)
    assert refused.code == 2
    assert "file/out: this folder cannot be created (Not a directory); choose another one" in refused.err


def test_sigterm_ends_it_with_75_and_the_same_command_resumes(tmp_path: Path):
    content = picture(0, (1500, 1500))
    files = {f"{name}/{number}.png": content for name in ("cat", "dog") for number in range(40)}
    source, out = write_folder(tmp_path / "photos", files), tmp_path / "out"
    command = [sys.executable, "-m", "asgo_cli", "data", "images", str(source), "--out", str(out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not (out / ".train.images.partial").exists():
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert err.splitlines()[-1].startswith("stopped: SIGTERM while copying to train.images; run the same command again")
    assert os.listdir(out) != []  # noqa: PTH208
    assert asgo("data", "images", source, "--out", out).code == 0
    data = open_images(out)
    assert (len(data.train), len(data.validation), data.train.read(5)) == (72, 8, content)
