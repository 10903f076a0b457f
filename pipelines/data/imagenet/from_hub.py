"""ImageNet from the hub's Parquet files: extracted, or copied into one file a split."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from pipelines.data.imagenet.archives import Progress, digest_of
from pipelines.data.imagenet.folder import PARTS
from pipelines.data.imagenet.hub import LISTING, Listing, Split, hub_files, load_listing
from pipelines.data.imagenet.hub_extract import extract_hub_files, pack_hub_files
from pipelines.data.imagenet.hub_files import count_images, read_hub_classes
from pipelines.data.imagenet.hub_parts import Parts
from pipelines.data.imagenet.index import SPLITS, Index, index_file, packed_file, write_index
from pipelines.data.imagenet.labels import ImageClass
from pipelines.data.imagenet.manifest import Layout, Origin, Piece
from pipelines.data.imagenet.origin import Contents, on_disk, require_room
from pipelines.errors import AsgoError

_HUB_SPLITS: dict[str, Split] = {"train": "train", "val": "validation"}


class HubFiles:
    """The hub's files in a folder; see `OriginFiles`."""

    origin: Origin = "hub"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
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
        classes = self._classes(report)
        parts = Parts(out / PARTS, [each.wnid for each in classes])
        self._require_room(out, layout, parts)
        indices = {}
        for split, paths in self._files.items():
            if layout == "extracted":
                extract_hub_files(paths, out / split, parts, workers, report)
            else:
                pack_hub_files(paths, out / packed_file(split), parts, report)
            indices[split] = _in_order(split, parts.joined(paths))
            write_index(out / index_file(split), indices[split], parts.wnids)
        return Contents(classes, indices, self._pieces(parts) if layout == "packed" else ())

    def _classes(self, report: Progress) -> tuple[ImageClass, ...]:
        """Sorted by their ids, and called by the first of their names, as those of the development kit."""
        paths = self._files["train"]

        def read() -> Iterator[Path]:
            for number, path in enumerate(paths):
                report("reading the labels", number, len(paths))
                yield path

        names = read_hub_classes(read())
        return tuple(ImageClass(wnid, names[wnid].partition(",")[0]) for wnid in sorted(names))

    def _require_room(self, out: Path, layout: Layout, parts: Parts) -> None:
        missing = [path for paths in self._files.values() for path in paths if parts.load(path) is None]
        needed = sum(path.stat().st_size for path in missing)
        if layout == "extracted":
            needed = on_disk(needed, sum(map(count_images, missing)))
        require_room(out, needed, "choose another --out")

    def _pieces(self, parts: Parts) -> tuple[Piece, ...]:
        return tuple(
            Piece(split=split, bytes=int(index.sizes.sum()), sha256=parts.sha256(path))
            for split, paths in self._files.items()
            for path in paths
            if (index := parts.load(path)) is not None
        )


def _in_order(split: str, index: Index) -> Index:
    return index if split == "train" else index.take(index.names.argsort(kind="stable"))
