"""Data sets of the hub arrive whole, and become folders with the images, labels and names of their Parquet files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from pipelines.data.image_sources.source import SourceOptions, prepare_images
from pipelines.data.images.image_sets import ImageData, open_images
from pipelines.data.images.manifest import ImageManifest, load_image_manifest
from pipelines.data.images.verify import verify_images
from pipelines.data.progress import Progress
from pipelines.errors import AsgoError, UsageError
from tests.command_lines import asgo
from tests.hub import Hub, client_environment
from tests.pipelines.data.imagenet.archive_makers import tree

from .image_makers import picture
from .test_files_importer import LARGE, _Stop, contents, pixels, stopping_at

NAMES = ["cat", "dog", "eel"]
Rows = Sequence[tuple[bytes | None, Any]]
"""The bytes and the label of each image."""


def rows(count: int, seed: int = 0, size: tuple[int, int] = (24, 16)) -> list[tuple[bytes, int]]:
    return [(picture(1000 * seed + number, size), (7 * number + seed) % 3) for number in range(count)]


def table(
    images: Rows,
    *,
    image: str = "img",
    label: str = "label",
    names: Sequence[str] | None = NAMES,
    more: Mapping[str, Sequence[Any]] = {},
) -> bytes:
    """Return a Parquet file with the columns and the note that `datasets` writes."""
    kinds: dict[str, Any] = {image: {"_type": "Image"}, **{name: {"_type": "Value"} for name in more}}
    if names is not None:
        kinds[label] = {"names": [*names], "_type": "ClassLabel"}
    columns = {
        image: pyarrow.array(
            [{"bytes": content, "path": None} for content, _ in images],
            pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]),
        ),
        label: pyarrow.array([each for _, each in images]),
        **{name: pyarrow.array(values) for name, values in more.items()},
    }
    made = pyarrow.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": kinds}})})
    buffer = pyarrow.BufferOutputStream()
    parquet.write_table(made, buffer, row_group_size=5)
    return bytes(buffer.getvalue())


def put(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Write a copy of the data set `me/pets` below a root, and return the root."""
    for path, content in files.items():
        (folder / "me" / "pets" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "me" / "pets" / path).write_bytes(content)
    return folder


def prepare(
    root: Path, out: Path, *, name: str = "me/pets", report: Progress = lambda *_: None, **options: Any
) -> ImageManifest:
    notify: Callable[[str], None] = options.pop("notify", lambda _: None)
    chosen = SourceOptions(root, **options)
    return prepare_images(f"hub:{name}", out, chosen, workers=2, overwrite=False, report=report, notify=notify)


def labelled(data: ImageData) -> dict[str, list[tuple[str, bytes]]]:
    """Return the class name and content of the images of each split, in the order of the files."""
    return {
        split: [
            (data.classes[images.labels[at]].name, images.read(at))
            for at in sorted(range(len(images)), key=lambda at: images.name(at).partition("/")[2])
        ]
        for split, images in (("train", data.train), ("val", data.validation))
    }


def expected(images: Rows, names: Sequence[str] = NAMES, *, decoded: bool = False) -> list[tuple[str, bytes]]:
    return [(names[label], pixels(content) if decoded else content) for content, label in images if content]


FIRST, SECOND, TEST = rows(13), rows(9, 1), rows(8, 2)


@pytest.mark.parametrize("extract", [None, True, False])
def test_images_labels_and_names_are_those_of_the_files(extract: bool | None, tmp_path: Path) -> None:
    files = {"train-00000-of-00002.parquet": table(FIRST), "train-00001-of-00002.parquet": table(SECOND)}
    files = {f"plain_text/{name}": content for name, content in files.items()}
    files |= {"plain_text/test-00000-of-00001.parquet": table(TEST), "README.md": b"x"}
    manifest = prepare(put(tmp_path, files), tmp_path / "out", extract=extract)
    data = open_images(tmp_path / "out")
    decoded = extract is None
    assert labelled(data) == {
        "train": expected(FIRST + SECOND, decoded=decoded),
        "val": expected(TEST, decoded=decoded),
    }
    assert [(each.id, each.name) for each in manifest.classes] == [("0", "cat"), ("1", "dog"), ("2", "eel")]
    assert manifest.layout == {None: "decoded", True: "extracted", False: "packed"}[extract]
    assert verify_images(tmp_path / "out", lambda *_: None) == []
    if extract:
        assert {path.suffix for path in (tmp_path / "out" / "train" / "0").iterdir()} == {".png"}


def test_what_datasets_writes_is_read(tmp_path: Path) -> None:
    import datasets

    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    for split, images in (("train", FIRST), ("test", TEST)):
        columns = {
            "image": [{"bytes": content, "path": None} for content, _ in images],
            "label": [n for _, n in images],
        }
        path = tmp_path / "me" / "pets" / "data" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(columns, features=kinds).to_parquet(str(path))
    prepare(tmp_path, tmp_path / "out", extract=False)
    assert labelled(open_images(tmp_path / "out")) == {"train": expected(FIRST), "val": expected(TEST)}


def test_without_validation_files_every_class_is_split(tmp_path: Path) -> None:
    root = put(tmp_path, {"data/train-00000-of-00001.parquet": table(rows(60, size=LARGE))})
    manifest = prepare(root, tmp_path / "out", val_fraction=0.25)
    assert [(each.train, each.validation) for each in manifest.classes] == [(15, 5)] * 3
    data = open_images(tmp_path / "out")
    assert sorted(sum(labelled(data).values(), [])) == sorted(expected(rows(60, size=LARGE)))  # noqa: RUF017
    assert prepare(root, tmp_path / "again", val_fraction=0.25).fingerprint == manifest.fingerprint


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (
            ["data/train-00000-of-00001-3f.parquet", "data/valid-00000-of-00001-a1.parquet", "data/test-0.parquet"],
            "valid",
        ),
        (["train.parquet", "validation.parquet", "test.parquet"], "validation"),
        (["data/train/0000.parquet", "data/test/0000.parquet"], "test"),
        (["pets_train_0.parquet", "pets_test_0.parquet"], "test"),
    ],
)
def test_splits_are_found_by_names_of_files_and_folders(files: list[str], names: str, tmp_path: Path) -> None:
    content = [table(FIRST), table(TEST), table(rows(5, 7))]
    root = put(tmp_path, dict(zip(files, content[: len(files)], strict=True)))
    prepare(root, tmp_path / "out", extract=False)
    assert labelled(open_images(tmp_path / "out")) == {"train": expected(FIRST), "val": expected(TEST)}


def test_a_subset_is_chosen_by_its_name(tmp_path: Path) -> None:
    files = {f"{subset}/{split}-00000-of-00001.parquet": table(rows(9, 10 * size + place, (8 + size, 8)))
             for size, subset in enumerate(("small", "large"))
             for place, split in enumerate(("train", "test"))}  # fmt: skip
    root = put(tmp_path, files)
    with pytest.raises(UsageError, match=r"hub:me/pets: has the subsets large, small; choose one: hub:me/pets:large$"):
        prepare(root, tmp_path / "out")
    with pytest.raises(UsageError, match="has the subsets large, small"):
        prepare(root, tmp_path / "out", name="me/pets:huge")
    assert prepare(root, tmp_path / "out", name="me/pets:large").image_shape == (8, 9, 3)
    with pytest.raises(UsageError, match=r"made with hub:me/pets:large and not hub:me/pets:small"):
        prepare(root, tmp_path / "out", name="me/pets:small")


@pytest.mark.parametrize(
    ("content", "options", "names"),
    [
        (table(FIRST, label="fine_label", more={"coarse_label": [0] * 13}), {"label_column": "fine_label"}, NAMES),
        (table(FIRST, names=None), {}, ["0", "1", "2"]),
        (table([(image, NAMES[label]) for image, label in FIRST], label="species", names=None),
         {"label_column": "species"}, NAMES),
        (table([(image, 10 * label - 5) for image, label in FIRST], label="n", names=None),
         {"label_column": "n"}, ["-5", "5", "15"]),
    ],
    ids=["two columns of labels", "no names", "strings", "numbers"],
)  # fmt: skip
def test_columns_are_found_or_chosen(content: bytes, options: dict[str, str], names: list[str], tmp_path: Path) -> None:
    root = put(tmp_path, {"data/train.parquet": content, "data/test.parquet": content})
    manifest = prepare(root, tmp_path / "out", extract=False, **options)
    assert [each.name for each in manifest.classes] == names
    assert labelled(open_images(tmp_path / "out"))["train"] == expected(FIRST, names)


def refused(files: Mapping[str, bytes], **options: Any) -> tuple[Mapping[str, bytes], dict[str, Any]]:
    return files, options


GOOD = table(FIRST)
TWICE = table(FIRST, more={"other": [{"bytes": b"x", "path": "x"}] * 13})
BAD = {
    "no files": (refused({"README.md": b"x"}), r"me/pets: no Parquet files; put those of hub:me/pets there"),
    "no images": (refused({"train.parquet": table(FIRST, more={"x": [1] * 13}), "test.parquet": GOOD},
                          image_column="x"), r"--image-column x: not a column of images; .*columns are img, label, x$"),
    "two columns of images": (refused({"train.parquet": TWICE, "test.parquet": TWICE}),
                              "columns are img, label, other, and 2 of them hold images; choose one with --image"),
    "no labels": (refused({"train.parquet": table(FIRST, label="n", names=None)}),
                  r"columns are img, n, and none of them holds labels; choose one with --label-column"),
    "an unknown column": (refused({"train.parquet": GOOD}, label_column="y"), "--label-column y: not a column of"),
    "a column of images for labels": (refused({"train.parquet": GOOD}, label_column="img"), "struct.*not labels"),
    "other columns": (refused({"train.parquet": GOOD, "test.parquet": table(TEST, image="picture")}),
                      r"test\.parquet: has not the columns img and label of train\.parquet"),
    "a missing file": (refused({"train-00001-of-00002.parquet": GOOD}), "of its 2 files, number 00000 is missing"),
    "no training files": (refused({"test.parquet": GOOD}), "no training files; it has those of test"),
    "unlabelled": (refused({"train.parquet": GOOD, "test.parquet": table([(picture(0), -1)])}),
                   r"test\.parquet: label -1 is not one of its 3 classes \(unlabelled images\?\)"),
    "no label": (refused({"train.parquet": table([*FIRST, (picture(0), None)])}), "row 13 has no label"),
    "a class less": (refused({"train.parquet": GOOD, "test.parquet": table([(picture(0), 0)])}),
                     r"me/pets: class 1, dog: no images in val"),
    "no bytes": (refused({"train.parquet": table([*FIRST, (None, 0)]), "test.parquet": GOOD}), "row 13: empty; pass"),
    "no image": (refused({"train.parquet": table([*FIRST, (b"<html>", 0)]), "test.parquet": GOOD}), "13: not an image"),
    "damaged": (refused({"train.parquet": GOOD[:-9], "test.parquet": GOOD}), r"train\.parquet: damaged file"),
}  # fmt: skip


@pytest.mark.parametrize(("given", "problem"), BAD.values(), ids=BAD)
def test_files_that_are_no_data_set_are_refused_in_one_line(
    given: tuple[Mapping[str, bytes], dict[str, Any]], problem: str, tmp_path: Path
) -> None:
    files, options = given
    with pytest.raises(AsgoError, match=problem) as told:
        prepare(put(tmp_path, files), tmp_path / "out", **options)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", ["pets", "me/pets/train", "", "me/", "me pets/x"])
def test_a_name_that_is_none_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"should be hub:OWNER/NAME, as in hub:uoft-cs/cifar10"):
        prepare(tmp_path, tmp_path / "out", name=name)


def test_images_that_are_none_are_skipped_if_so_wished(tmp_path: Path) -> None:
    bad = [*FIRST[:4], (b"<html>", 1), *FIRST[4:], (None, 2)]
    root = put(tmp_path, {"data/train.parquet": table(bad), "data/test.parquet": table(TEST)})
    told: list[str] = []
    prepare(root, tmp_path / "out", extract=False, skip_bad=True, notify=told.append)
    assert labelled(open_images(tmp_path / "out"))["train"] == expected(FIRST)
    assert told == [f"{root}/me/pets/data/train.parquet: row 4: not an image (and 1 more): skipped"]


@pytest.mark.parametrize("extract", [None, False])
def test_damaged_images_are_named_or_skipped(extract: bool | None, tmp_path: Path) -> None:
    bad = [*FIRST[:4], (FIRST[4][0][:200], 1), *FIRST[4:]]
    root = put(tmp_path, {"data/train.parquet": table(bad), "data/test.parquet": table(TEST)})
    with pytest.raises(AsgoError, match=r"train\.parquet: row 4: this image cannot be decoded: .*; pass --skip-bad"):
        prepare(root, tmp_path / "out", extract=extract)
    told: list[str] = []
    manifest = prepare(root, tmp_path / "again", extract=extract, skip_bad=True, notify=told.append)
    assert sum(each.train for each in manifest.classes) == len(FIRST)
    assert [line.endswith("(200 bytes): skipped") for line in told] == [True]


def test_stopped_at_any_report_it_ends_with_the_same_folder(tmp_path: Path) -> None:
    files = {f"data/train-0000{number}-of-00003.parquet": table(rows(6, number)) for number in range(3)}
    root = put(tmp_path, files | {"data/test.parquet": table(TEST)})
    expected = prepare(root, tmp_path / "expected"), tree(tmp_path / "expected")
    for moment in range(1, 110, 5):
        try:
            prepare(root, tmp_path / "out", report=stopping_at(moment))
        except _Stop:
            assert not (tmp_path / "out" / "manifest.json").exists()
    assert (prepare(root, tmp_path / "out"), tree(tmp_path / "out")) == expected


PROGRAM = """
import sys
from pathlib import Path
from pipelines.data.image_sources.source import SourceOptions, prepare_images
from pipelines.errors import AsgoError

root, *names = sys.argv[1:]
for name in names:
    try:
        prepare_images(f"hub:{name}", Path(root, "out", name), SourceOptions(Path(root), download=True), workers=1,
                       overwrite=False, report=lambda *_: None, notify=print)
        print(name, "done")
    except AsgoError as error:
        print(error)
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub(tmp_path / "hub") as running:
        running.add("me/pets", "data/train-00000-of-00002.parquet", table(FIRST))
        running.add("me/pets", "data/train-00001-of-00002.parquet", table(SECOND))
        running.add("me/pets", "data/test-00000-of-00001.parquet", table(TEST))
        running.add("me/pets", "README.md", b"# pets")
        running.add("me/zipped", "data.zip", b"PK")
        yield running


def test_files_are_downloaded_once_and_checked(hub: Hub, tmp_path: Path) -> None:
    """In a process of its own, because the hub's client reads HF_ENDPOINT once."""
    names = ["me/pets", "me/zipped", "me/nothing", "me/pets"]
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), *names]
    environment = {**client_environment(hub.endpoint, tmp_path / "home"), "HF_TOKEN": "hf_mine"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    lines = ended.stdout.splitlines()
    assert lines[0] == lines[3] == "me/pets done", ended.stderr
    assert lines[1] == "hub:me/zipped: has no Parquet files; import its archive or folder instead"
    assert lines[2].startswith("me/nothing: HTTP 401")
    assert len(hub.downloads("parquet")) == 3
    assert {request.authorization for request in hub.downloads()} == {"Bearer hf_mine"}
    assert not hub.downloads("README")
    out = tmp_path / "out" / "me" / "pets"
    assert labelled(open_images(out)) == {
        "train": expected(FIRST + SECOND, decoded=True),
        "val": expected(TEST, decoded=True),
    }
    assert load_image_manifest(out).revision == hub.sha("me/pets")
    prepare(tmp_path, tmp_path / "again")
    path = tmp_path / "me" / "pets" / "data" / "test-00000-of-00001.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:20] + b"x" + content[21:])
    with pytest.raises(AsgoError, match=r"test-00000-of-00001\.parquet: its SHA-256 is not the one"):
        prepare(tmp_path, tmp_path / "third")
    path.unlink()
    with pytest.raises(UsageError, match=r"test-00000-of-00001\.parquet: missing; get it with --download"):
        prepare(tmp_path, tmp_path / "fourth")


def test_an_interrupted_import_names_the_whole_command(tmp_path: Path) -> None:
    root = put(tmp_path, {"data/train.parquet": GOOD, "data/test.parquet": GOOD})
    with pytest.raises(_Stop):
        prepare(root, tmp_path / "out", report=stopping_at(8), skip_bad=True, label_column="label")
    with pytest.raises(AsgoError) as told:
        load_image_manifest(tmp_path / "out")
    command = str(told.value).partition("resume with: asgo ")[2]
    assert command == f"data images hub:me/pets --root {root} --label-column label --skip-bad --out {tmp_path}/out"
    assert asgo(*command.split()).code == 0
    assert np.array_equal(open_images(tmp_path / "out").train.labels, sorted(label for _, label in FIRST))
    assert contents(open_images(tmp_path / "out"))
