import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
from rich.cells import cell_len
from typer.testing import CliRunner, Result

from asgo_cli import console, data
from pipelines.data.imagenet.importer import prepare_imagenet
from pipelines.data.images.manifest import load_image_manifest
from pipelines.data.manifest import DocumentCounts, SourcePosition, load_manifest, write_manifest
from pipelines.data.text_to_shards import prepare_text
from pipelines.errors import AsgoError, UsageError
from tests.pipelines.data.imagenet.archive_makers import CLASSES, noise, pictures, write_archives
from tests.pipelines.data.imagenet.hub_makers import write_hub_copy

BEGINNING = "colour \x1b[31mred\x1b[0m, a\ttab, \u202e bidi, [bold]x[/bold]\r\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Shards of bytes: 1,801 tokens validate, 16,202 train."""
    (tmp_path / "text.txt").write_bytes((BEGINNING + "日本語" * 2000).encode()[:18_000])
    prepare_text([tmp_path / "text.txt"], tmp_path / "my data", tokenizer="bytes", val_fraction=0.1)
    return tmp_path / "my data"


def asgo_data(*arguments: object) -> Result:
    return CliRunner().invoke(data.app, [str(argument) for argument in arguments])


def write_byte(path: Path, place: int, value: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        file.write(value)


def test_verify_shows_each_shard_and_fails_when_one_is_bad(folder: Path):
    good = asgo_data("verify", folder)
    assert good.exit_code == 0
    assert good.stdout.count("good") == 2
    assert f"next: asgo train gpt --data '{folder}'" in good.stderr
    write_byte(folder / "shard_000001.bin", 1030, b"\x07")
    bad = asgo_data("verify", folder)
    assert isinstance(bad.exception, AsgoError)
    assert "1 of 2 shards are bad, the first is shard_000001.bin" in str(bad.exception)
    assert "altered" in bad.stdout


def test_verify_gives_json_and_nothing_else_on_stdout(folder: Path):
    (folder / "shard_000000.bin").unlink()
    shards = load_manifest(folder).shards
    assert json.loads(asgo_data("verify", folder, "--json").stdout) == [
        {"file": "shard_000000.bin", "tokens": shards[0].tokens, "documents": 1, "problem": "missing"},
        {"file": "shard_000001.bin", "tokens": shards[1].tokens, "documents": 1, "problem": None},
    ]


def test_a_long_check_says_now_and_then_how_far_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0.0)
    size = sum(path.stat().st_size for path in folder.glob("*.bin"))
    assert f"checking: {size / 1000:.1f} kB of {size / 1000:.1f} kB" in asgo_data("verify", folder).stderr


def test_info_shows_what_a_folder_holds_and_where_it_came_from(folder: Path):
    manifest = load_manifest(folder)
    documents = DocumentCounts(read=1200, empty=3, repaired=1)
    last = manifest.shards[1].model_copy(update={"next_start": SourcePosition(document=1199, token=17)})
    changes = {"documents": documents, "recipe": {"subset": "10BT", "shards": 1}, "shards": (manifest.shards[0], last)}
    write_manifest(folder, manifest.model_copy(update=changes))
    result = asgo_data("info", folder)
    assert result.exit_code == 0, result.output
    for fact in (
        str(folder.parent / "text.txt")[:40],
        "subset 10BT, shards 1",
        "bytes, vocabulary of 257",
        f"{last.tokens:,} tokens, 1 document, 1 shard",
        "1,200 read, 3 empty and skipped, 1 not valid Unicode and repaired",
        "in document 1,199 of the source, after 17 of its tokens",
        "shard_000001.bin",
    ):
        assert fact in result.stdout
    assert f"next: asgo data verify '{folder}'" in result.stderr


def test_info_shows_each_beginning_on_one_line_that_no_terminal_obeys(folder: Path):
    lines = asgo_data("info", folder).stdout.splitlines()
    training = next(line for line in lines if line.startswith("training     c"))
    assert training.startswith(r"training     colour \x1b[31mred\x1b[0m, a\ttab, \u202e bidi, [bold]x[/bold]\r")
    assert training.rstrip().endswith("…")
    assert lines[lines.index(training) + 1].startswith("validation   ")
    assert all(cell_len(line) <= 80 and line.isprintable() for line in lines)


def test_info_says_which_shard_is_missing(folder: Path):
    (folder / "shard_000001.bin").unlink()
    result = asgo_data("info", folder)
    assert result.exit_code == 0
    assert "missing" in next(line for line in result.stdout.splitlines() if "shard_000001.bin" in line)


def test_info_gives_json_and_nothing_else_on_stdout(folder: Path):
    found = json.loads(asgo_data("info", folder, "--lines", "1", "--json").stdout)
    assert found["vocab_size"] == 257
    assert found["documents"]["read"] == 1
    assert found["beginnings"]["training"][0].startswith(BEGINNING)
    assert len(found["beginnings"]["validation"]) == 1
    for shard in found["shards"]:
        assert shard["bytes"] == (folder / shard["file"]).stat().st_size


def test_the_makers_come_before_what_looks_at_a_folder():
    commands = asgo_data("--help").stdout.partition("Commands:\n")[2].partition("\n\n")[0]
    listed = [line.split()[0] for line in commands.splitlines()]
    assert listed[0] == "text"
    assert listed[-2:] == ["info", "verify"]


def make_imagenet(tmp_path: Path, *, classes: int = 3, extract: bool = True) -> Path:
    """Four images of each class train and two validate; of many classes they are no pictures."""
    content = pictures(classes, 4, 2) if classes <= 10 else noise(classes, 4, 2, 20)
    first = next(iter(content.train.values()))
    first.pop(next(iter(first)))
    out = tmp_path / "my images"
    prepare_imagenet(write_archives(tmp_path / "archives", content), out, extract=extract, report=lambda *_: None)
    return out


@pytest.mark.parametrize("extract", [True, False])
def test_info_counts_the_images_of_each_class(tmp_path: Path, extract: bool):
    result = asgo_data("info", folder := make_imagenet(tmp_path, extract=extract))
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert ("files in train and val" if extract else "left in ILSVRC2012_img_train.tar") in result.stdout
    assert any(line.split()[:4] == ["train", "11", "images,", "3"] and "3 to 4 per class" in line for line in lines)
    assert any(line.split()[:4] == ["validation", "6", "images,", "2"] for line in lines)
    rows = [line.replace("│", " ").split() for line in lines]
    assert ["n01440764", "tench", "3", "2"] in rows
    assert ["n01770393", "scorpion", "4", "2"] in rows
    assert f"next: asgo train imagenet --data '{folder}'" in result.stderr


def test_info_shows_the_first_of_many_classes_and_json_all(tmp_path: Path):
    folder = make_imagenet(tmp_path, classes=41, extract=False)
    result = asgo_data("info", folder)
    assert result.stdout.count("│ n1") == 20
    assert "and 21 more classes; --json shows all" in result.stderr
    found = json.loads(asgo_data("info", folder, "--json").stdout)
    assert (found["kind"], found["layout"]) == ("images", "packed")
    assert [each["train"] for each in found["classes"]] == [3] + 40 * [4]


def test_info_draws_a_contact_sheet_and_names_the_images_it_could_not(tmp_path: Path):
    folder = make_imagenet(tmp_path)
    bad = min((folder / "train" / "n01443537").iterdir())
    bad.write_bytes(bytes(bad.stat().st_size))
    result = asgo_data("info", folder, "--contact-sheet", tmp_path / "new" / "sheet.png", "--json")
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["classes"]) == 3
    assert (tmp_path / "new" / "sheet.png").read_bytes().startswith(b"\x89PNG")
    assert f"warning: n01443537/{bad.name}: this image is no JPEG, PNG, WebP, BMP, GIF, PPM or TIFF" in result.stderr
    assert f"wrote {tmp_path / 'new' / 'sheet.png'}" in result.stderr


def test_a_contact_sheet_of_tokens_is_refused(folder: Path, tmp_path: Path):
    result = asgo_data("info", folder, "--contact-sheet", tmp_path / "sheet.png")
    assert isinstance(result.exception, UsageError)
    assert "holds token shards" in str(result.exception)
    assert not result.stdout
    assert not (tmp_path / "sheet.png").exists()


@pytest.mark.parametrize("extract", [True, False])
def test_verify_finds_nothing_wrong_with_a_good_imagenet(tmp_path: Path, extract: bool):
    result = asgo_data("verify", folder := make_imagenet(tmp_path, extract=extract))
    assert result.exit_code == 0, result.output
    assert not result.stdout
    assert f"next: asgo train imagenet --data '{folder}'" in result.stderr


def test_verify_names_each_image_that_is_not_as_it_was(tmp_path: Path):
    folder = make_imagenet(tmp_path)
    missing, cut, *_ = sorted((folder / "train" / "n01443537").iterdir())
    missing.unlink()
    cut.write_bytes(b"x")
    (folder / "val" / "n01443537" / "more.JPEG").write_bytes(b"x")
    result = asgo_data("verify", folder)
    assert isinstance(result.exception, AsgoError)
    assert "my images: 3 problems, the first with train/n01443537/" in str(result.exception)
    lines = result.stdout.splitlines()
    assert f"train/n01443537/{missing.name}: missing" in lines
    assert any(line.startswith(f"train/n01443537/{cut.name}: 1 bytes long, not ") for line in lines)
    assert "val/n01443537/more.JPEG: not part of this ImageNet; remove it" in lines


def test_verify_finds_an_altered_byte_in_archives_and_index(tmp_path: Path):
    folder = make_imagenet(tmp_path, extract=False)
    write_byte(tmp_path / "archives" / "ILSVRC2012_img_val.tar", 600, b"\x07")
    write_byte(folder / "train.parquet", 10, b"\x07")
    result = asgo_data("verify", folder)
    assert isinstance(result.exception, AsgoError)
    assert "ILSVRC2012_img_val.tar: altered: its MD5 is not the one in the manifest" in result.stdout
    assert "train.parquet: altered since it was written" in result.stdout


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """The hub's copy, 12 training pictures of 3 files and 6 validation pictures of 2 files, in one file a split."""
    copy, out = write_hub_copy(tmp_path / "hub", pictures(3, 4, 2)), tmp_path / "packed"
    prepare_imagenet(copy, out, origin="hub", extract=False, report=lambda *_: None)
    shutil.rmtree(copy)
    return out


def test_verify_finds_nothing_wrong_with_good_packed_files(packed: Path):
    result = asgo_data("verify", packed)
    assert (result.exit_code, result.stdout) == (0, ""), result.output
    assert "in train.images and val.images" in asgo_data("info", packed).stdout


def test_verify_tells_of_missing_cut_and_foreign_packed_files_in_a_line_each(packed: Path):
    (packed / "train.images").unlink()
    size = (packed / "val.images").stat().st_size
    os.truncate(packed / "val.images", size - 1)
    (packed / "train").mkdir()
    result = asgo_data("verify", packed)
    assert isinstance(result.exception, AsgoError)
    assert "packed: 3 problems, the first with train;" in str(result.exception)
    assert result.stdout.splitlines() == [
        "train: left by an interrupted run; remove it",
        "train.images: missing",
        f"val.images: {size - 1:,} bytes long, not {size:,}",
    ]


def test_verify_says_between_which_bytes_a_packed_file_is_altered(packed: Path):
    first, second, third = (piece.bytes for piece in load_image_manifest(packed).pieces if piece.split == "train")
    write_byte(packed / "train.images", first, b"\x07")  # a JPEG begins with another byte
    write_byte(packed / "train.images", first + second + third - 1, b"\x07")  # nor does one end so
    result = asgo_data("verify", packed)
    assert isinstance(result.exception, AsgoError)
    begins = [first, first + second, first + second + third]
    assert set(result.stdout.splitlines()) == {
        f"train.images: altered between byte {begin:,} and byte {end:,}" for begin, end in itertools.pairwise(begins)
    }


@pytest.mark.parametrize("command", ["info", "verify"])
def test_an_unfinished_imagenet_says_which_command_goes_on(tmp_path: Path, command: str):
    folder = make_imagenet(tmp_path)
    recipe = {"archives": str(tmp_path / "archives"), "layout": "extracted"}
    (folder / "unfinished.json").write_text(json.dumps({"format_version": 2, "kind": "imagenet", "recipe": recipe}))
    (folder / "manifest.json").unlink()
    result = asgo_data(command, folder)
    assert isinstance(result.exception, AsgoError)
    assert f"resume with: asgo data imagenet --archives {tmp_path / 'archives'}" in str(result.exception)


def test_no_terminal_obeys_the_name_of_a_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(CLASSES, "n01440764", "\u202etench[bold]\x1b[31m")
    assert r"n01440764 \u202etench[bold]\x1b[31m " in asgo_data("info", make_imagenet(tmp_path)).stdout
