"""Notes of which of the hub's files are done, so that whoever is killed goes on with the next one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipelines.data.imagenet.hub_files import HubImage
from pipelines.data.imagenet.index import Index, read_index, write_index
from pipelines.errors import AsgoError
from pipelines.storage import write_atomically


class Parts:
    """The index of each file that is done, and a digest of its pictures if they were copied, in files of a folder."""

    def __init__(self, folder: Path, wnids: Sequence[str]) -> None:
        """`wnids` are all classes, sorted."""
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self.wnids = tuple(wnids)
        self._places = {wnid: place for place, wnid in enumerate(wnids)}

    def label(self, path: Path, image: HubImage) -> int:
        """The label of a picture in `path`. Raises `AsgoError` when its class is not known."""
        try:
            return self._places[image.wnid]
        except KeyError:
            raise AsgoError(f"{path}: {image.name} is of the class {image.wnid}, of which no picture trains") from None

    def save(self, path: Path, labels: Sequence[int], names: Sequence[str], sizes: Sequence[int], sha256: str) -> None:
        """Note that `path` is done: its pictures, in their order."""
        sizes_there = np.array(sizes, dtype=np.int64)
        index = Index(
            np.array(labels, dtype=np.int64),
            np.array([name.encode() for name in names], dtype=np.bytes_),
            np.cumsum(sizes_there) - sizes_there,
            sizes_there,
        )
        write_atomically(self._digest_file(path), sha256.encode())
        write_index(self._folder / path.name, index, self.wnids)

    def load(self, path: Path) -> Index | None:
        """The pictures of `path`, with offsets that count from its first one; None if it is not done."""
        noted = self._folder / path.name
        return read_index(noted, self.wnids) if noted.exists() else None

    def sha256(self, path: Path) -> str:
        """What `save` was given."""
        return self._digest_file(path).read_text()

    def joined(self, paths: Sequence[Path]) -> Index:
        """The index of all `paths`, which are done, in the order of (class, name).

        Offsets count as if the pictures of all files lay one after another. Raises `AsgoError` for two of one name.
        """
        parts = [part for path in paths if (part := self.load(path)) is not None]
        assert len(parts) == len(paths)
        sizes = np.concatenate([part.sizes for part in parts])
        whole = Index(
            np.concatenate([part.labels for part in parts]),
            np.concatenate([part.names for part in parts]),
            np.cumsum(sizes) - sizes,
            sizes,
        )
        whole = whole.take(np.lexsort((whole.names, whole.labels)))
        twice = np.flatnonzero((whole.names[1:] == whole.names[:-1]) & (whole.labels[1:] == whole.labels[:-1]))
        if len(twice):
            raise AsgoError(f"{paths[0].parent}: two pictures are named {whole.names[twice[0]].decode()}")
        return whole

    def _digest_file(self, path: Path) -> Path:
        return self._folder / f"{path.name}.sha256"
