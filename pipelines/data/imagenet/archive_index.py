"""Where every image lies in the archives of ImageNet."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from pipelines.data.imagenet.devkit import Labels
from pipelines.data.imagenet.tar import Member, Tar, read_members
from pipelines.data.images.index import Index, build_index, joined
from pipelines.data.progress import Progress

_SUFFIXES = (".jpeg", ".jpg", ".png")
_READERS = 8
"""Threads, where headers come from a disk: there one alone takes two to four times as long. Where they come from the
cache, several take twice as long as one, because they wait for the interpreter's lock at every header."""

_SLOW_S = 50e-6
"""Seconds a header from which on it came from a disk; one from the cache takes 10 µs."""
_NOTE = "._"


def build_train_index(tar: Tar, labels: Labels, progress: Progress) -> Index:
    """The index of the archive of training images, which holds a tar archive a class.

    Raises `AsgoError` for a class too many or too few, and what `read_members` refuses.
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
    _tell_skipped(skipped, progress)
    return joined(parts)


def _index_class(tar: Tar, label: int, skipped: list[str]) -> Index:
    members = sorted(_read_files(tar, skipped))
    if not members:
        tar.refuse("holds no images")
    return _index(tar, members, itertools.repeat(label, len(members)))


def build_validation_index(tar: Tar, labels: Labels, progress: Progress) -> Index:
    """The index of the archive of validation images, which are numbered from 1 on.

    Raises `AsgoError` when they are not those that the development kit has labels for, and what `read_members` refuses.
    """
    progress("indexing the validation images", 0, 1)
    skipped: list[str] = []
    members = {member.name: member for member in _read_files(tar, skipped)}
    _tell_skipped(skipped, progress)
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
    """The members, without macOS's notes on others (AppleDouble), such as `._n01440764_10026.JPEG`: to `skipped`."""
    members = read_members(tar)
    skipped += [member.name for member in members if member.name.startswith(_NOTE)]
    return [member for member in members if not member.name.startswith(_NOTE)]


def _tell_skipped(skipped: Sequence[str], progress: Progress) -> None:
    if skipped:
        progress(f"skipping {len(skipped):,} files of macOS, such as {skipped[0]}", 1, 1)


def _require_same(tar: Tar, found: Mapping[str, Member], wanted: Sequence[str], what: str) -> None:
    expected = set(wanted)
    for name in found:
        if name not in expected:
            tar.refuse(f"{name} is no {what} that the development kit knows")
    for name in wanted:
        if name not in found:
            tar.refuse(f"the {what} {name} is missing")


def _index(tar: Tar, members: Sequence[Member], labels: Iterable[int]) -> Index:
    for member in members:
        if not member.name.lower().endswith(_SUFFIXES):
            tar.refuse(f"member {member.name} is not named as an image")
    names, sizes = [member.name for member in members], [member.size for member in members]
    return build_index(labels, names, sizes, [member.offset for member in members])
