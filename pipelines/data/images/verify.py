"""Verify that a folder of images still holds what was written."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipelines.data.images.extract import expected_sizes, sizes_in
from pipelines.data.images.folder import OURS
from pipelines.data.images.index import SPLITS, Index, index_file, packed_file, read_index
from pipelines.data.images.manifest import ImageManifest, Piece, SourceFile, load_image_manifest
from pipelines.data.manifest import MANIFEST
from pipelines.data.progress import Progress, Tally, digest_of, in_threads
from pipelines.errors import AsgoError

_BLOCK = 4 << 20


@dataclass(frozen=True, order=True)
class Problem:
    """A file or folder, and what is wrong with it."""

    file: str
    problem: str


def verify_images(folder: Path, report: Progress) -> list[Problem]:
    """Check the index files by their SHA-256, and the images.

    Extracted images must have the right names and sizes, without other files; source files that are read in place, and
    packed images, must have the right digests. Raises as `load_image_manifest` does.
    """
    check = _Check(folder, load_image_manifest(folder))
    check.find_foreign()
    jobs = list(check.jobs())
    report_bytes = partial(report, f"checking {folder}")
    in_threads(jobs, os.cpu_count() or 1, check.tally, lambda done: report_bytes(done, check.total))
    return sorted(check.problems)


class _Check:
    def __init__(self, folder: Path, manifest: ImageManifest) -> None:
        self.problems: list[Problem] = []
        self.tally = Tally()
        self.total = 0
        self._folder = folder
        self._manifest = manifest
        self._foreign = f"not part of this {manifest.dataset}; remove it"
        self._class_ids = manifest.class_ids
        sha256s = (manifest.train_index, manifest.validation_index)
        self._indices = {split: self._index(split, sha256) for split, sha256 in zip(SPLITS, sha256s, strict=True)}

    def find_foreign(self) -> None:
        """Record files that do not belong to the folder."""
        images = SPLITS if self._manifest.layout == "extracted" else self._packed_files()
        known = {MANIFEST, *map(index_file, SPLITS), *images}
        for path in self._folder.iterdir():
            if path.name not in known:
                self._tell(path, "left by an interrupted run; remove it" if path.name in OURS else self._foreign)

    def jobs(self) -> Iterator[Callable[[], None]]:
        """Yield the checks to run; adds their amounts of work to `total`."""
        if self._manifest.layout == "extracted":
            yield from self._class_jobs()
        elif self._manifest.containers:
            for source in self._manifest.source_files:
                yield self._job(source.bytes, self._check_source, source)
        else:
            for split in SPLITS:
                yield from self._piece_jobs(split)

    def _job(self, amount: int, work: Callable[..., None], *arguments: object) -> Callable[[], None]:
        self.total += amount
        return partial(self._guarded, work, *arguments)

    def _guarded(self, work: Callable[..., None], *arguments: object) -> None:
        try:
            work(*arguments)
        except FileNotFoundError as error:
            self._tell(Path(error.filename), "missing")
        except OSError as error:  # a bad sector or a missing permission: record it and check the other files
            self._tell(Path(error.filename or self._folder), error.strerror or str(error))

    def _tell(self, path: Path, problem: str) -> None:
        inside = path.is_relative_to(self._folder)
        self.problems.append(Problem(str(path.relative_to(self._folder) if inside else path), problem))

    def _packed_files(self) -> tuple[str, ...]:
        return tuple(map(packed_file, SPLITS)) if not self._manifest.containers else ()

    def _index(self, split: str, sha256: str) -> Index | None:
        try:
            return read_index(self._folder / index_file(split), self._class_ids, sha256)
        except AsgoError as error:
            self.problems.append(Problem(index_file(split), str(error).partition(": ")[2]))
            return None

    def _class_jobs(self) -> Iterator[Callable[[], None]]:
        for split, index in self._indices.items():
            if index is None:
                continue
            classes = {self._class_ids[label]: images for label, images in index.by_class()}
            for name in sizes_in(self._folder / split).keys() - classes.keys():
                self._tell(self._folder / split / name, self._foreign)
            for class_id, images in classes.items():
                yield self._job(len(images), self._check_class, self._folder / split / class_id, images)

    def _check_class(self, folder: Path, images: Index) -> None:
        expected, there = expected_sizes(images), sizes_in(folder)
        if not folder.is_dir():
            self._tell(folder, f"missing, with {len(expected):,} images")
            there = expected
        for name in expected.keys() - there.keys():
            self._tell(folder / name, "missing")
        for name in there.keys() - expected.keys():
            self._tell(folder / name, self._foreign)
        for name in expected.keys() & there.keys():
            if there[name] < 0:
                self._tell(folder / name, "not a plain file")
            elif there[name] != expected[name]:
                self._tell(folder / name, f"{there[name]:,} bytes long, not {expected[name]:,}")
        self.tally.advance(len(images))

    def _check_source(self, source: SourceFile) -> None:
        path = Path(self._manifest.source_folder) / source.file
        size = path.stat().st_size
        if size != source.bytes:
            self._tell(path, f"{size:,} bytes long, not {source.bytes:,}")
            return
        algorithm, _, expected = source.digest.partition(":")
        counted = 0

        def count(done: int, total: int) -> None:
            nonlocal counted
            self.tally.advance(done - counted)
            counted = done

        if digest_of(path, algorithm, count) != expected:
            self._tell(path, f"altered: its {algorithm.upper()} is not the one in the manifest")

    def _piece_jobs(self, split: str) -> Iterator[Callable[[], None]]:
        path, pieces = self._folder / packed_file(split), [p for p in self._manifest.pieces if p.split == split]
        begins = list(itertools.accumulate((piece.bytes for piece in pieces), initial=0))
        if not path.is_file():
            self._tell(path, "missing")
        elif (size := path.stat().st_size) != begins[-1]:
            self._tell(path, f"{size:,} bytes long, not {begins[-1]:,}")
        else:
            for piece, begin in zip(pieces, begins, strict=False):
                yield self._job(piece.bytes, self._check_piece, piece, begin)

    def _check_piece(self, piece: Piece, begin: int) -> None:
        path, digest, left = self._folder / packed_file(piece.split), hashlib.sha256(), piece.bytes
        with path.open("rb", buffering=0) as file:
            file.seek(begin)
            while block := file.read(min(_BLOCK, left)):
                digest.update(block)
                left -= len(block)
                self.tally.advance(len(block))
        if digest.hexdigest() != piece.sha256:
            self._tell(path, f"altered between byte {begin:,} and byte {begin + piece.bytes:,}")
