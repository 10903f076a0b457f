"""Decoded images of one size: find the size, decode, and write raw pixels, one file per split."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.data.images.decode import BadImageError, EncodedImage
from pipelines.data.images.extract import partial_folder
from pipelines.data.images.importing import Contents, require_every_class, require_room
from pipelines.data.images.index import ImageClass, build_index, index_file, packed_file, write_index
from pipelines.data.images.manifest import ImageShape, Piece
from pipelines.data.progress import Progress
from pipelines.storage import refusing_links, sync

LARGEST_DECODED = 64
"""Images with sides of at most so many pixels are stored decoded if all have one size."""
_BYTES_AT_ONCE = 16 << 20


@dataclass(frozen=True)
class PixelSet:
    """The images of a split: `pixels` uint8 (images, height, width, channels), `labels` int64 (images,)."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]


def import_pixels(
    sets: Mapping[str, PixelSet], classes: tuple[ImageClass, ...], out: Path, report: Progress
) -> Contents:
    """Write the images of each split and their indices to `out`; see `ImageImporter.make`.

    An image is named by its number in the source. Starts again after a kill: the largest of these data sets take
    seconds. Raises `AsgoError` for a class without images, and if the disk has too little room.
    """
    require_every_class(classes, {split: each.labels for split, each in sets.items()})
    require_room(out, sum(each.pixels.nbytes for each in sets.values()), "choose another --out")
    indices, pieces = {}, []
    for split, images in sets.items():
        count, *shape = images.pixels.shape
        names = [f"{number:0{len(str(count - 1))}d}" for number in range(count)]
        size = int(np.prod(shape))
        order = images.labels.argsort(kind="stable") if split == "train" else np.arange(count)
        indices[split] = build_index(images.labels[order], [names[at] for at in order], [size] * count)
        write_index(out / index_file(split), indices[split], [each.id for each in classes])
        sha256 = write_pixels(out / packed_file(split), images.pixels, order, report)
        pieces.append(Piece(split=split, bytes=count * size, sha256=sha256))
    height, width, channels = shape
    return Contents(classes, indices, tuple(pieces), image_shape=(height, width, 1 if channels == 1 else 3))


def write_pixels(target: Path, pixels: NDArray[np.uint8], order: NDArray[np.int64], report: Progress) -> str:
    """Write `pixels[order]` to `target`, under a hidden name until it is complete; return its SHA-256."""
    hidden, digest = partial_folder(target), hashlib.sha256()
    step = max(1, _BYTES_AT_ONCE // pixels[0].nbytes)
    with open(hidden, "wb", opener=refusing_links) as file:
        for begin in range(0, len(order), step):
            report(f"writing {target.name}", begin, len(order))
            block = np.ascontiguousarray(pixels[order[begin : begin + step]])
            file.write(block.data)
            digest.update(block.data)
        file.flush()
        os.fsync(file.fileno())
    hidden.rename(target)
    sync(target.parent)
    return digest.hexdigest()


def numbered_classes(names: Sequence[str]) -> tuple[ImageClass, ...]:
    """Return classes whose ids are their numbers, so that sorting by id keeps the order of `names`."""
    width = len(str(len(names) - 1))
    return tuple(ImageClass(f"{number:0{width}d}", name) for number, name in enumerate(names))


def common_shape(images: Iterable[tuple[str, bytes]]) -> ImageShape | None:
    """Return the shape of encoded images, given as (name, content), if all have one size of at most 64 x 64 pixels.

    Stops at the first image with another size. Grey images have one channel, unless others have colours. Raises
    `BadImageError`.
    """
    sizes, is_grey = set(), True
    for name, content in images:
        image = EncodedImage(content, name)
        sizes.add((image.height, image.width))
        is_grey &= image.is_grey
        if len(sizes) > 1 or max(image.height, image.width) > LARGEST_DECODED:
            return None
    if not sizes:
        return None
    ((height, width),) = sizes
    return height, width, 1 if is_grey else 3


def decode_to(shape: ImageShape, name: str, content: bytes) -> bytes:
    """Return the pixels of an image. Raises `BadImageError` for a damaged image and for one of another shape."""
    image = EncodedImage(content, name)
    pixels = image.pixels()[..., : shape[2]]
    if pixels.shape != shape:
        raise BadImageError(f"{name}: this image has {image.width} x {image.height} pixels; it has changed")
    return pixels.tobytes()
