"""Pictures from the hub's files into a folder a class, by several threads, or one after another into one file."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pipelines.data.imagenet.archives import Progress
from pipelines.data.imagenet.hub_files import HubImage, count_images, read_hub_file
from pipelines.data.imagenet.hub_parts import Parts
from pipelines.data.imagenet.image_files import (
    expected_sizes,
    make_partial_folder,
    partial_folder,
    publish,
    reopen,
    require_only,
    sizes_in,
    write_image,
)
from pipelines.data.imagenet.index import Index
from pipelines.data.imagenet.threads import Tally, in_threads
from pipelines.storage import refusing_links, sync


@dataclass
class _Rows:
    """The pictures of a file that were met so far."""

    labels: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def add(self, label: int, image: HubImage) -> None:
        self.labels.append(label)
        self.names.append(image.name)
        self.sizes.append(len(image.content))


def extract_hub_files(paths: Sequence[Path], target: Path, parts: Parts, workers: int, progress: Progress) -> None:
    """Write the pictures of `paths` to `target/<wnid>/<name>`; what is there already is kept.

    A class has pictures in every file, so all folders are hidden, as `.<wnid>.partial`, until the last file is done.
    `progress` is called in this thread, many times a second, with numbers of pictures, and ends the work by raising.

    Raises `AsgoError` for what `read_hub_file` refuses, two pictures of one name and a file in the way, and `OSError`
    when the disk refuses.
    """
    target.mkdir(exist_ok=True)
    for folder in (target / wnid for wnid in parts.wnids):
        if folder.exists():
            reopen(folder)
        make_partial_folder(folder)
    there = [sizes_in(partial_folder(target / wnid)) for wnid in parts.wnids]
    total = sum(map(count_images, paths))
    tally = Tally()
    jobs = [partial(_extract_file, path, target, parts, there, tally) for path in paths]
    in_threads(jobs, workers, tally, lambda done: progress(f"extracting to {target.name}", done, total))
    whole = parts.joined(paths)
    expected = {label: expected_sizes(images) for label, images in whole.by_class()}
    for label, wnid in enumerate(parts.wnids):
        require_only(expected.get(label, {}), partial_folder(target / wnid), there[label])
    for label, wnid in enumerate(parts.wnids):
        if label in expected:
            publish(target / wnid, expected[label])
        else:
            partial_folder(target / wnid).rmdir()


def _extract_file(path: Path, target: Path, parts: Parts, there: list[dict[str, int]], tally: Tally) -> None:
    before = parts.load(path)
    if before is not None and _are_there(before, there):
        tally.advance(len(before))
        return
    rows = _Rows()
    for image in read_hub_file(path):
        if tally.stop.is_set():
            return
        label = parts.label(path, image)
        if there[label].get(image.name) != len(image.content):
            write_image(partial_folder(target / image.wnid) / image.name, image.content)
        rows.add(label, image)
        tally.advance(1)
    parts.save(path, rows.labels, rows.names, rows.sizes, "")


def _are_there(images: Index, there: list[dict[str, int]]) -> bool:
    columns = zip(images.labels.tolist(), images.names.tolist(), images.sizes.tolist(), strict=True)
    return all(there[label].get(name.decode()) == size for label, name, size in columns)


def pack_hub_files(paths: Sequence[Path], target: Path, parts: Parts, progress: Progress) -> None:
    """Copy the pictures of `paths`, one after another and nothing between them, to the file `target`.

    It is written under a hidden name. After a kill, whole files of the hub that are noted in `parts` are not read
    again, and what is behind them is cut off. `progress` is called for every picture, with numbers of pictures.

    Raises `AsgoError` for what `read_hub_file` refuses and two pictures of one name, and `OSError` when the disk
    refuses.
    """
    packed = partial_folder(target)
    if target.exists():
        target.rename(packed)
    counts = list(map(count_images, paths))
    finished, end = _finished(paths, packed, parts)
    done = itertools.count(sum(counts[:finished]))
    with open(packed, "ab", opener=refusing_links) as file:
        file.truncate(end)
        for path in paths[finished:]:
            rows, digest = _Rows(), hashlib.sha256()
            for image in read_hub_file(path):
                progress(f"copying to {target.name}", next(done), sum(counts))
                rows.add(parts.label(path, image), image)
                file.write(image.content)
                digest.update(image.content)
            file.flush()
            os.fsync(file.fileno())
            parts.save(path, rows.labels, rows.names, rows.sizes, digest.hexdigest())
    parts.joined(paths)
    packed.rename(target)
    sync(target.parent)


def _finished(paths: Sequence[Path], packed: Path, parts: Parts) -> tuple[int, int]:
    """How many files from the first one on are copied, and where their pictures end."""
    length, end = packed.stat().st_size if packed.exists() else 0, 0
    for number, path in enumerate(paths):
        part = parts.load(path)
        if part is None or end + int(part.sizes.sum()) > length:
            return number, end
        end += int(part.sizes.sum())
    return len(paths), end
