"""The sheet shows the pictures that the labels below them belong to."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.analysis.contact_sheet import draw_contact_sheet
from pipelines.data.imagenet.importer import prepare_imagenet
from pipelines.errors import AsgoError, UsageError
from tests.pipelines.data.imagenet.archive_makers import CLASSES, Content, write_archives

COLOURS = [(220, 0, 0), (0, 180, 0), (0, 0, 220)]


def flat(colour: tuple[int, int, int], size: tuple[int, int] = (40, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "JPEG", quality=95)
    return file.getvalue()


def coloured(wnids: list[str]) -> Content:
    """Of each class a first image in its colour, and a black one."""
    train = {
        wnid: {f"{wnid}_1.JPEG": flat(COLOURS[label % 3]), f"{wnid}_2.JPEG": flat((0, 0, 0))}
        for label, wnid in enumerate(wnids)
    }
    return Content(train, [(wnid, flat((0, 0, 0))) for wnid in wnids])


def make(folder: Path, content: Content, *, extract: bool = True) -> Path:
    archives = write_archives(folder / "archives", content)
    out = folder / ("files" if extract else "in place")
    prepare_imagenet(archives, out, extract=extract, report=lambda phase, done, total: None)
    return out


def texts(sheet: Path) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]+)</text>", sheet.read_text())


def test_each_picture_stands_above_its_own_label(tmp_path: Path) -> None:
    wnids = sorted(CLASSES)[:3]
    folder = make(tmp_path, coloured(wnids))
    assert draw_contact_sheet(folder, tmp_path / "sheet.png") == ()
    pixels = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).astype(int)
    places = [np.argwhere(np.abs(pixels - colour).max(axis=2) < 12) for colour in COLOURS]
    assert all(len(each) > 20_000 for each in places)
    left_to_right = [each[:, 1].mean() for each in places]
    assert left_to_right == sorted(left_to_right)
    draw_contact_sheet(folder, tmp_path / "sheet.svg")
    words = texts(tmp_path / "sheet.svg")
    assert words == [*(word for wnid in wnids for word in (wnid, CLASSES[wnid])), words[-1]]


def test_of_many_classes_twenty_are_spread_from_the_first_to_the_last(tmp_path: Path) -> None:
    wnids = [f"n{10_000_000 + label:08d}" for label in range(39)]
    folder = make(tmp_path, coloured(wnids))
    draw_contact_sheet(folder, tmp_path / "sheet.svg")
    shown = texts(tmp_path / "sheet.svg")
    assert shown[:-1] == wnids[::2]
    assert shown[-1] == "First training images, 20 of 39 classes"


def test_both_layouts_give_the_same_sheet(tmp_path: Path) -> None:
    content = coloured(sorted(CLASSES)[:2])
    for extract, name in ((True, "a.png"), (False, "b.png")):
        draw_contact_sheet(make(tmp_path, content, extract=extract), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_an_image_that_cannot_be_decoded_is_an_empty_frame_with_its_name(tmp_path: Path) -> None:
    wnids = sorted(CLASSES)[:3]
    content = coloured(wnids)
    content.train[wnids[1]][f"{wnids[1]}_1.JPEG"] = b"not a picture"
    (problem,) = draw_contact_sheet(make(tmp_path, content), tmp_path / "sheet.svg")
    assert problem.startswith(f"{wnids[1]}/{wnids[1]}_1.JPEG: ")
    words = texts(tmp_path / "sheet.svg")
    assert {f"{wnids[1]}_1.JPEG", "cannot be decoded", *wnids} <= set(words)
    assert (tmp_path / "sheet.svg").read_text().count("<image") == 2


def test_names_are_text_and_long_ones_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wnid = sorted(CLASSES)[0]
    monkeypatch.setitem(CLASSES, wnid, "$x$ a name that goes on " + "and on " * 20)
    draw_contact_sheet(make(tmp_path, coloured([wnid])), tmp_path / "sheet.svg")
    first, *name, _ = texts(tmp_path / "sheet.svg")
    assert (first, len(name)) == (wnid, 2)
    assert name[0].startswith("$x$ a name")
    assert name[1].endswith("…")


def test_a_missing_image_or_another_kind_of_file_is_an_error_and_nothing_is_written(tmp_path: Path) -> None:
    wnid = sorted(CLASSES)[0]
    folder = make(tmp_path, coloured([wnid]))
    with pytest.raises(UsageError, match=r"must end in \.png"):
        draw_contact_sheet(folder, tmp_path / "sheet.jpg")
    (folder / "train" / wnid / f"{wnid}_1.JPEG").unlink()
    with pytest.raises(AsgoError, match=f"{wnid}_1.JPEG: No such file"):
        draw_contact_sheet(folder, tmp_path / "sheet.png")
    assert not list(tmp_path.glob("*sheet*"))
