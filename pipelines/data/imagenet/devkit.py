"""Read the classes of ImageNet and the labels of its validation images from the development kit."""

from __future__ import annotations

import io
import re
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipelines.data.images.index import ImageClass
from pipelines.errors import AsgoError

MAP = "map_clsloc.txt"
_META = "meta.mat"
_GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_LARGEST = 64 << 20

WNID = re.compile(r"n\d{8}", re.ASCII)
_MAP_LINE = re.compile(r"(n\d{8}) +(\d+) +(\S+)", re.ASCII)


@dataclass(frozen=True)
class Labels:
    """All classes, sorted by id, and the class ids of the validation images, in the order of the images' numbers."""

    classes: tuple[ImageClass, ...]
    validation: tuple[str, ...]


def read_devkit(path: Path) -> Labels:
    """Read the development kit; extracts nothing to the disk.

    The ground truth gives classes by ILSVRC2012_ID, which is not the order of the WordNet ids. `map_clsloc.txt`, in the
    kit or beside it, maps one to the other; without it, the kit's `meta.mat` does.

    Raises `AsgoError` if the kit cannot be read or lacks a file, or a number has no class.
    """
    files = _read_files(path)
    beside = path.parent / MAP
    if MAP in files:
        numbered = _parse_map(files[MAP], f"{path}: {MAP}")
    elif beside.exists():
        numbered = _parse_map(beside.read_bytes(), str(beside))
    elif _META in files:
        numbered = _parse_meta(files[_META], path)
    else:
        raise AsgoError(f"{path}: holds neither {_META} nor {MAP}")
    if _GROUND_TRUTH not in files:
        raise AsgoError(f"{path}: holds no {_GROUND_TRUTH}")
    validation = _parse_ground_truth(files[_GROUND_TRUTH], numbered, path)
    return Labels(tuple(sorted(numbered.values(), key=lambda each: each.id)), validation)


def _read_files(path: Path) -> dict[str, bytes]:
    files = {}
    try:
        with tarfile.open(path, "r:gz") as kit:
            for entry in kit:
                name = PurePosixPath(entry.name).name
                if name in (MAP, _META, _GROUND_TRUTH) and entry.isreg() and entry.size <= _LARGEST:
                    content = kit.extractfile(entry)
                    assert content is not None  # a regular file has one
                    files[name] = content.read()
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise AsgoError(f"{path}: not a whole tar.gz archive ({error})") from None
    except OSError as error:
        raise AsgoError(f"{path}: {error.strerror or error}") from None
    return files


def _parse_map(content: bytes, origin: str) -> dict[int, ImageClass]:
    """Parse lines such as "n02119789 1 kit_fox"."""
    rows = []
    for number, line in enumerate(content.decode("utf-8", errors="replace").splitlines(), start=1):
        match = _MAP_LINE.fullmatch(line.strip())
        if match is None:
            raise AsgoError(f"{origin}: line {number} is not a WordNet id, a number and a name")
        rows.append((int(match[2]), match[1], match[3].replace("_", " ")))
    return _numbered(rows, origin)


def _parse_meta(content: bytes, path: Path) -> dict[int, ImageClass]:
    import scipy.io  # not needed with map_clsloc.txt

    try:
        synsets = scipy.io.loadmat(io.BytesIO(content), squeeze_me=True)["synsets"]
        rows = [
            (int(each["ILSVRC2012_ID"]), str(each["WNID"]), str(each["words"]).partition(",")[0])
            for each in synsets
            if int(each["num_children"]) == 0  # the others are groups of classes
        ]
    except Exception as error:  # scipy's parser raises many kinds of errors on damaged files
        raise AsgoError(f"{path}: {_META} cannot be read ({type(error).__name__})") from None
    return _numbered(rows, f"{path}: {_META}")


def _numbered(rows: list[tuple[int, str, str]], origin: str) -> dict[int, ImageClass]:
    classes = {number: ImageClass(wnid, name) for number, wnid, name in rows}
    if not rows or len({wnid for _, wnid, _ in rows}) != len(rows) or len(classes) != len(rows):
        raise AsgoError(f"{origin}: a class or a number occurs twice, or there are none")
    for wnid in (wnid for _, wnid, _ in rows if not WNID.fullmatch(wnid)):
        raise AsgoError(f"{origin}: {wnid!r} is not a WordNet id")
    return classes


def _parse_ground_truth(content: bytes, numbered: Mapping[int, ImageClass], path: Path) -> tuple[str, ...]:
    wnids = []
    for number, line in enumerate(content.decode("ascii", errors="replace").splitlines(), start=1):
        try:
            wnids.append(numbered[int(line)].id)
        except (ValueError, KeyError):
            raise AsgoError(f"{path}: {_GROUND_TRUTH}: line {number} is {line!r}, not the number of a class") from None
    return tuple(wnids)
