"""The Parquet files of the hub's copy of ImageNet: pictures as they came, named with their class.

Its columns are `image`, a struct of `bytes` and `path`, and `label`, the class's place among the sorted WordNet ids.
The paths are the official names with the class once more at the end: `n01440764_10026_n01440764.JPEG` and
`ILSVRC2012_val_00000293_n01440764.JPEG`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from pipelines.data.imagenet.hub import LISTING, Listing, Split, hub_files, load_listing
from pipelines.data.images.importing import Contents
from pipelines.data.images.index import SPLITS, ImageClass
from pipelines.data.images.manifest import Layout
from pipelines.data.images.streams import SourceReader, StreamedImage, import_streams
from pipelines.data.parquet_text import UnreadableColumn, rows_at_once
from pipelines.data.progress import Progress, digest_of
from pipelines.errors import AsgoError
from pipelines.storage import parse_json

_HUB_SPLITS: dict[str, Split] = {"train": "train", "val": "validation"}
_PATH = re.compile(r"((?:(n\d{8})_\d+|ILSVRC2012_val_\d{8}))_(n\d{8})\.JPEG")
_PICTURES_AT_ONCE = 32
_NAMES_AT_ONCE = 1024
_READ_BYTES = 2 << 20


def read_hub_file(path: Path) -> Iterator[StreamedImage]:
    """The pictures of a Parquet file in their order, a few megabytes in memory at once.

    Raises `AsgoError` for a damaged file, other columns, a page that is too large, a picture without bytes, a path of
    another form, and two pictures of one name.
    """
    seen: set[str] = set()
    with _opened(path) as table:
        for batch in _batches(path, table, _PICTURES_AT_ONCE, "image.bytes", "image.path"):
            for image in batch.column(0).to_pylist():
                wnid, name = _parse(path, image and image["path"], seen)
                if not image["bytes"]:
                    raise AsgoError(f"{path}: {name} has no bytes")
                yield StreamedImage(wnid, name, image["bytes"])


def count_images(path: Path) -> int:
    """How many pictures a file has. Raises as `read_hub_file` does."""
    with _opened(path) as table:
        return int(table.metadata.num_rows)


def read_hub_classes(paths: Iterable[Path]) -> dict[str, str]:
    """What the classes are called, by WordNet id, in the order of their labels; read without the pictures.

    Raises as `read_hub_file` does, and `AsgoError` when two classes have one label, the names are not given, or a class
    has no picture in all the files.
    """
    wnids: dict[int, str] = {}
    names: list[str] = []
    for path in paths:
        seen: set[str] = set()
        with _opened(path) as table:
            names = names or _label_names(path, table.schema_arrow)
            for batch in _batches(path, table, _NAMES_AT_ONCE, "image.path", "label"):
                for image, label in zip(batch.column(0).to_pylist(), batch.column(1).to_pylist(), strict=True):
                    wnid = _parse(path, image and image["path"], seen)[0]
                    if wnids.setdefault(label, wnid) != wnid or not 0 <= label < len(names):
                        raise AsgoError(f"{path}: label {label} is that of {wnids[label]} and of {wnid}")
    for label, name in enumerate(names):
        if label not in wnids:
            raise AsgoError(f"{path.parent}: no picture of the class {label}, {name}; download the files again")
    return {wnids[label]: name for label, name in enumerate(names)}


def _batches(path: Path, table: parquet.ParquetFile, most: int, *columns: str) -> Iterator[pyarrow.RecordBatch]:
    """At most so many rows at a time. The pages are looked at before: a kilobyte can claim to unpack to gigabytes."""
    with path.open("rb") as file:
        for number in range(table.num_row_groups):
            group = table.metadata.row_group(number)
            rows = min(rows_at_once(file, group, column, most) for column in columns)
            yield from table.iter_batches(rows, row_groups=[number], columns=list(columns))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[parquet.ParquetFile]:
    try:
        # Without its read-ahead, which would end with the whole file in memory.
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=_READ_BYTES) as table:
            _require_columns(path, table.schema_arrow)
            yield table
    except UnreadableColumn as error:
        raise AsgoError(f"{path}: {error}") from None
    except (pyarrow.ArrowException, ValueError) as error:
        raise AsgoError(f"{path}: damaged file ({' '.join(str(error).split())}); remove it and get it again") from None
    except OSError as error:
        raise AsgoError(f"{path}: {error.strerror or ' '.join(str(error).split())}") from None


def _require_columns(path: Path, schema: pyarrow.Schema) -> None:
    image: Any = schema.field("image").type if "image" in schema.names else pyarrow.null()
    fields = {field.name: field.type for field in image} if pyarrow.types.is_struct(image) else {}
    if fields.get("bytes") != pyarrow.binary() or fields.get("path") != pyarrow.string() or "label" not in schema.names:
        raise AsgoError(f'{path}: no columns "image" (bytes, path) and "label"; it has {", ".join(map(str, schema))}')


def _label_names(path: Path, schema: pyarrow.Schema) -> list[str]:
    """From the note that `datasets` leaves in its files."""
    with contextlib.suppress(KeyError, ValueError, TypeError):
        note: dict[str, Any] = parse_json((schema.metadata or {})[b"huggingface"])
        return [str(name) for name in note["info"]["features"]["label"]["names"]]
    raise AsgoError(f"{path}: it does not say what the classes are called")


def _parse(path: Path, name: str | None, seen: set[str]) -> tuple[str, str]:
    """The class and the official name of a picture whose name is not among those `seen`, to which it is added."""
    match = _PATH.fullmatch(name or "")
    if match is None or match[2] not in (None, match[3]):
        raise AsgoError(f"{path}: {name!r} is not as the hub names the pictures of ImageNet")
    if match[1] in seen:  # at once: a kilobyte can repeat a picture without end
        raise AsgoError(f"{path}: two pictures are named {match[1]}.JPEG")
    seen.add(match[1])
    return match[3], f"{match[1]}.JPEG"


_READER = SourceReader(read_hub_file, count_images)


class HubImporter:
    """The hub's files in a folder; see `ImageImporter`."""

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

    def find(self) -> list[Path]:
        self._listing = load_listing(self.folder)
        self._files = {split: hub_files(self.folder, _HUB_SPLITS[split]) for split in SPLITS}
        return [path for split in SPLITS for path in self._files[split]]

    def expected(self, path: Path) -> str | None:
        listed = () if self._listing is None else self._listing.files
        digests = [file.sha256 for file in listed if Path(file.path).name == path.name and file.sha256]
        return f"sha256:{digests[0]}" if digests else None

    def check(self, path: Path, report: Progress) -> str:
        digest = f"sha256:{digest_of(path, 'sha256', partial(report, f'checking {path.name}'))}"
        expected = self.expected(path)
        if expected is not None and digest != expected:
            raise AsgoError(
                f"{path}: its SHA-256 is not the one that the hub told; remove it and get it again with --download, "
                f"or remove {self.folder / LISTING} if it is of another edition"
            )
        return digest

    def make(self, out: Path, layout: Layout, workers: int, report: Progress) -> Contents:
        return import_streams(self._files, _READER, self._classes(report), out, layout, workers, report)

    def _classes(self, report: Progress) -> tuple[ImageClass, ...]:
        """Sorted by their ids, and called by the first of their names, as those of the development kit."""
        paths = self._files["train"]

        def read() -> Iterator[Path]:
            for number, path in enumerate(paths):
                report("reading the labels", number, len(paths))
                yield path

        names = read_hub_classes(read())
        return tuple(ImageClass(wnid, names[wnid].partition(",")[0]) for wnid in sorted(names))
