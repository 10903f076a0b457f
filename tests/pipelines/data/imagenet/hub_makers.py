"""Copies of ImageNet as the hub has them, of the same content as the archives of `archive_makers`."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from .archive_makers import CLASSES, Content

Row = tuple[bytes | None, str | None, int]
"""The bytes, the path and the label of a picture."""


def write_rows(path: Path, rows: Sequence[Row], note: Any) -> Path:
    """A file as the hub has them: the columns, the row groups and the note of `datasets`."""
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    schema = pyarrow.schema([("image", image), ("label", pyarrow.int64())], metadata={"huggingface": json.dumps(note)})
    columns = {
        "image": [{"bytes": content, "path": name} for content, name, _ in rows],
        "label": [label for *_, label in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns, schema), path, row_group_size=100)
    return path


def features(names: Iterable[str]) -> dict[str, Any]:
    """The note in which `datasets` says what the classes are called."""
    label = {"names": list(names), "_type": "ClassLabel"}
    return {"info": {"features": {"image": {"_type": "Image"}, "label": label}}}


def write_hub_copy(folder: Path, content: Content, *, train: int = 3, validation: int = 2) -> Path:
    """All pictures of `content` in so many files a split, in any order; gives `folder`."""
    wnids = sorted(content.train)
    train_rows = [
        (image, f"{name.removesuffix('.JPEG')}_{wnid}.JPEG", wnids.index(wnid))
        for wnid, images in content.train.items()
        for name, image in images.items()
    ]
    validation_rows = [
        (image, f"ILSVRC2012_val_{number:08d}_{wnid}.JPEG", wnids.index(wnid))
        for number, (wnid, image) in enumerate(content.validation, start=1)
    ]
    for split, rows, files in (("train", train_rows, train), ("validation", validation_rows, validation)):
        random.Random(0).shuffle(rows)
        for index in range(files):
            write_rows(
                folder / "data" / f"{split}-{index:05d}-of-{files:05d}.parquet",
                rows[index::files],
                features(f"{CLASSES.get(wnid, wnid)}, of its kind" for wnid in wnids),
            )
    return folder
