"""Read the Parquet files of the hub's copy of ImageNet, which hold the original image files.

Their columns are `image`, a struct of `bytes` and `path`, and `label`, the index of the class in the sorted WordNet
ids. A path is the official name with the class at the end: `n01440764_10026_n01440764.JPEG` or
`ILSVRC2012_val_00000293_n01440764.JPEG`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow
from pyarrow import parquet

from pipelines.data.hub_copy import Listing, check_file, listed_digest, load_listing
from pipelines.data.imagenet.hub import Split, hub_files
from pipelines.data.images.importing import Contents
from pipelines.data.images.index import SPLITS, ImageClass
from pipelines.data.images.manifest import Layout
from pipelines.data.images.parquet_images import IMAGES_AT_ONCE, batches, class_names, is_image_column, opened_table
from pipelines.data.images.streams import SourceReader, StreamedImage, import_streams
from pipelines.data.progress import Progress
from pipelines.errors import AsgoError

_HUB_SPLITS: dict[str, Split] = {"train": "train", "val": "validation"}
_PATH = re.compile(r"((?:(n\d{8})_\d+|ILSVRC2012_val_\d{8}))_(n\d{8})\.JPEG")
_NAMES_AT_ONCE = 1024


def read_hub_file(path: Path) -> Iterator[StreamedImage]:
    """Yield the images of a Parquet file in order, with a few megabytes in memory at a time.

    Raises `AsgoError` for a damaged file, other columns, a page that is too large, an image without bytes, a path of
    another form, and two images with the same name.
    """
    seen: set[str] = set()
    with _opened(path) as table:
        for batch in batches(path, table, IMAGES_AT_ONCE, "image.bytes", "image.path"):
            for image in batch.column(0).to_pylist():
                wnid, name = _parse(path, image and image["path"], seen)
                if not image["bytes"]:
                    raise AsgoError(f"{path}: {name} has no bytes")
                yield StreamedImage(wnid, name, image["bytes"])


def count_images(path: Path) -> int:
    """Return the number of images of a file. Raises as `read_hub_file` does."""
    with _opened(path) as table:
        return int(table.metadata.num_rows)


def read_hub_classes(paths: Iterable[Path]) -> dict[str, str]:
    """Return the names of the classes by WordNet id, in the order of the labels. Does not read the images.

    Raises as `read_hub_file` does, and `AsgoError` if two classes have the same label, the files give no names, or a
    class has no image in any file.
    """
    wnids: dict[int, str] = {}
    names: list[str] = []
    for path in paths:
        seen: set[str] = set()
        with _opened(path) as table:
            names = names or _label_names(path, table.schema_arrow)
            for batch in batches(path, table, _NAMES_AT_ONCE, "image.path", "label"):
                for image, label in zip(batch.column(0).to_pylist(), batch.column(1).to_pylist(), strict=True):
                    wnid = _parse(path, image and image["path"], seen)[0]
                    if wnids.setdefault(label, wnid) != wnid or not 0 <= label < len(names):
                        raise AsgoError(f"{path}: label {label} belongs to both {wnids[label]} and {wnid}")
    for label, name in enumerate(names):
        if label not in wnids:
            raise AsgoError(f"{path.parent}: no image of class {label}, {name}; download the files again")
    return {wnids[label]: name for label, name in enumerate(names)}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[parquet.ParquetFile]:
    with opened_table(path) as table:
        schema = table.schema_arrow
        if not is_image_column(schema, "image") or "label" not in schema.names:
            columns = ", ".join(map(str, schema))
            raise AsgoError(f'{path}: no columns "image" (bytes, path) and "label"; it has {columns}')
        yield table


def _label_names(path: Path, schema: pyarrow.Schema) -> list[str]:
    names = class_names(schema, "label")
    if names is None:
        raise AsgoError(f"{path}: the names of the classes are missing")
    return names


def _parse(path: Path, name: str | None, seen: set[str]) -> tuple[str, str]:
    """Return the class and the official name of an image, and add the name to `seen`, where it must not be yet."""
    match = _PATH.fullmatch(name or "")
    if match is None or match[2] not in (None, match[3]):
        raise AsgoError(f"{path}: {name!r} is not a name of an ImageNet image on the hub")
    if match[1] in seen:  # checked here, not at the end: a small file can repeat an image almost without end
        raise AsgoError(f"{path}: two images are named {match[1]}.JPEG")
    seen.add(match[1])
    return match[3], f"{match[1]}.JPEG"


_READER = SourceReader(read_hub_file, count_images)


class HubImporter:
    """Imports the hub's files in a folder; see `ImageImporter`."""

    dataset = "ImageNet"
    command = "imagenet"

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.options = {"source": "hub", "archives": str(self.folder)}
        self._files: dict[str, tuple[Path, ...]] = {}
        self._listing: Listing | None = None

    @property
    def revision(self) -> str | None:
        return None if self._listing is None else self._listing.revision

    def find(self, report: Progress) -> list[Path]:
        self._listing = load_listing(self.folder)
        self._files = {split: hub_files(self.folder, _HUB_SPLITS[split]) for split in SPLITS}
        return [path for split in SPLITS for path in self._files[split]]

    def expected(self, path: Path) -> str | None:
        return listed_digest(self.folder, path)

    def check(self, path: Path, report: Progress) -> str:
        return check_file(self.folder, path, report)

    def make(self, out: Path, layout: Layout, workers: int, report: Progress) -> Contents:
        return import_streams(self._files, _READER, self._classes(report), out, layout, workers, report)

    def _classes(self, report: Progress) -> tuple[ImageClass, ...]:
        """Return the classes sorted by id, each with its first name, as the development kit gives them."""
        paths = self._files["train"]

        def read() -> Iterator[Path]:
            for number, path in enumerate(paths):
                report("reading the labels", number, len(paths))
                yield path

        names = read_hub_classes(read())
        return tuple(ImageClass(wnid, names[wnid].partition(",")[0]) for wnid in sorted(names))
