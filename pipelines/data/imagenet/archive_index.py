"""Index the images in the archives of ImageNet."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from pipelines.data.imagenet.devkit import Labels
from pipelines.data.images.index import Index, build_index, joined
from pipelines.data.images.tar import Member, Tar, read_members
from pipelines.data.progress import Progress

_SUFFIXES = (".jpeg", ".jpg", ".png")
_READERS = 8
"""Threads that read headers from a disk; one thread takes two to four times as long. For headers in the page cache,
several threads take twice as long as one, because they wait for the GIL at every header."""

_SLOW_S = 50e-6
"""Slower headers, in seconds per header, come from a disk; one in the page cache takes 10 µs."""
_NOTE = "._"


def build_train_index(tar: Tar, labels: Labels, progress: Progress) -> Index:
    """Return the index of the archive of training images, which holds one tar archive per class.

    Raises `AsgoError` for an unknown or missing class, and as `read_members` does.
    """
    archives = [tar.inside(member) for member in _class_archives(tar, labels)]
    began = time.perf_counter()
    skipped: list[str] = []
    parts = [_index_class(archives[0], 0, skipped)]
    is_slow = time.perf_counter() - began > _SLOW_S * len(parts[0])
    with ThreadPoolExecutor(_READERS if is_slow else 1) as pool:
        try:
            for part in pool.map(_index_class, archives[1:], range(1, len(archives)), itertools.repeat(skipped)):
                parts.append(part)
                progress("indexing the training images", len(parts), len(archives))
        finally:
            pool.shutdown(cancel_futures=True)
    _report_skipped(skipped, progress)
    return joined(parts)


def _index_class(tar: Tar, label: int, skipped: list[str]) -> Index:
    members = sorted(_read_files(tar, skipped))
    if not members:
        tar.refuse("holds no images")
    return _index(tar, members, itertools.repeat(label, len(members)))


def build_validation_index(tar: Tar, labels: Labels, progress: Progress) -> Index:
    """Return the index of the archive of validation images, which are numbered from 1.

    Raises `AsgoError` if the images differ from those in the development kit, and as `read_members` does.
    """
    progress("indexing the validation images", 0, 1)
    skipped: list[str] = []
    members = {member.name: member for member in _read_files(tar, skipped)}
    _report_skipped(skipped, progress)
    names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, len(labels.validation) + 1)]
    _require_same(tar, members, names, "image")
    places = {each.id: label for label, each in enumerate(labels.classes)}
    return _index(tar, [members[name] for name in names], (places[wnid] for wnid in labels.validation))


def _class_archives(tar: Tar, labels: Labels) -> list[Member]:
    members = {member.name: member for member in _read_files(tar, [])}
    names = [f"{each.id}.tar" for each in labels.classes]
    _require_same(tar, members, names, "class archive")
    return [members[name] for name in names]


def _read_files(tar: Tar, skipped: list[str]) -> list[Member]:
    """Return the members; add AppleDouble files of macOS, such as `._n01440764_10026.JPEG`, to `skipped` instead."""
    members = read_members(tar)
    skipped += [member.name for member in members if member.name.startswith(_NOTE)]
    return [member for member in members if not member.name.startswith(_NOTE)]


def _report_skipped(skipped: Sequence[str], progress: Progress) -> None:
    if skipped:
        progress(f"skipping {len(skipped):,} metadata files of macOS, such as {skipped[0]}", 1, 1)


def _require_same(tar: Tar, found: Mapping[str, Member], wanted: Sequence[str], what: str) -> None:
    expected = set(wanted)
    for name in found:
        if name not in expected:
            tar.refuse(f"the development kit has no {what} {name}")
    for name in wanted:
        if name not in found:
            tar.refuse(f"the {what} {name} is missing")


def _index(tar: Tar, members: Sequence[Member], labels: Iterable[int]) -> Index:
    for member in members:
        if not member.name.lower().endswith(_SUFFIXES):
            tar.refuse(f"the name of member {member.name} is not that of an image")
    names, sizes = [member.name for member in members], [member.size for member in members]
    return build_index(labels, names, sizes, [member.offset for member in members])
