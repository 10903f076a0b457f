"""What `prepare_imagenet` asks of each place that ImageNet may come from."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipelines.data.imagenet.archives import Progress
from pipelines.data.imagenet.index import Index
from pipelines.data.imagenet.labels import ImageClass
from pipelines.data.imagenet.manifest import Layout, Origin, Piece
from pipelines.errors import AsgoError

_DISK_BLOCK = 4096


@dataclass(frozen=True)
class Contents:
    """What was made: the classes by their WordNet ids, the index of each split, and what packed files consist of."""

    classes: tuple[ImageClass, ...]
    indices: Mapping[str, Index]
    pieces: tuple[Piece, ...] = ()


class OriginFiles(Protocol):
    """The files that the images come in."""

    @property
    def origin(self) -> Origin:
        """What kind of files they are."""

    @property
    def folder(self) -> Path:
        """Where they are."""

    @property
    def revision(self) -> str | None:
        """Of the hub's repository."""

    def find(self) -> Sequence[Path]:
        """All files. Raises `UsageError` or `AsgoError` that names what is missing, with the way to get it."""

    def expected(self, path: Path) -> str | None:
        """The digest, such as "md5:…", that a file must have, if that is known."""

    def check(self, path: Path, report: Progress) -> str:
        """Read a file through for its digest. Raises `AsgoError` when it is another than expected."""

    def make(self, out: Path, layout: Layout, workers: int, report: Progress) -> Contents:
        """Write the index files and, as `layout` asks, the images into `out`, or go on with them."""


def on_disk(bytes: int, images: int) -> int:
    """How much so many images take as files, of which each ends with half a block in the mean."""
    return bytes + images * _DISK_BLOCK // 2


def require_room(out: Path, needed: int, otherwise: str) -> None:
    """Refuse at once what would fill the disk after hours. Raises `AsgoError` that tells what to do `otherwise`."""
    free = shutil.disk_usage(out).free
    if free < needed:
        raise AsgoError(
            f"{out}: the images take {needed / 1e9:,.1f} GB and {free / 1e9:,.1f} GB are free; "
            f"make room, or {otherwise}"
        )
