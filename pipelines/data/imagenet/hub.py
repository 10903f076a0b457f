"""The gated copy of ImageNet on the Hugging Face hub: Parquet files of the original images."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pipelines.data.hub_copy import Repository, download_files
from pipelines.data.progress import Progress
from pipelines.data.retries import Notify
from pipelines.errors import AsgoError

REPOSITORY = "ILSVRC/imagenet-1k"
Split = Literal["train", "validation"]

_FOLDER = "data"
_NAME = re.compile(r"(train|validation)-(\d{5})-of-(\d{5})(?:-[0-9a-f]+)?\.parquet")


def download_hub_copy(folder: Path, *, progress: Progress, notify: Notify) -> str:
    """Download the hub's files of both splits to `folder`/data; return the commit. See `download_files`."""
    return download_files(Repository(REPOSITORY, _FOLDER, _choose), folder, progress=progress, notify=notify)


def _choose(paths: Sequence[str]) -> list[str]:
    chosen = [path for path in paths if _NAME.fullmatch(Path(path).name)]
    if not chosen:
        raise AsgoError(f"{REPOSITORY}: the hub no longer has its Parquet files; download the archives instead")
    return chosen


def hub_files(folder: Path, split: Split) -> tuple[Path, ...]:
    """Return the files of a split in `folder`/data, in order. Raises `AsgoError` with the first missing one."""
    found = {match[0]: match for path in (folder / _FOLDER).glob("*") if (match := _NAME.fullmatch(path.name))}
    names = sorted(name for name, match in found.items() if match[1] == split)
    counts = {int(found[name][3]) for name in names}
    if len(counts) > 1:
        raise AsgoError(f"{folder / _FOLDER}: {split} files of two editions; keep the files of one edition")
    present = {int(found[name][2]) for name in names}
    for index in range(counts.pop() if counts else 1):
        if index not in present:
            raise AsgoError(
                f"{folder / _FOLDER}: the hub's {split} file {index:05d} is missing; get it with --download"
            )
    return tuple(folder / _FOLDER / name for name in names)
