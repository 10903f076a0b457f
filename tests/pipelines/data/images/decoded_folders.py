"""Data folders of decoded images, as `asgo data images` makes them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.data.images.index import Index, build_index, fingerprint, index_file, packed_file, write_index
from pipelines.data.images.manifest import ClassEntry, ImageManifest, Piece, write_image_manifest

Pixels = NDArray[np.uint8]


def stripes(count: int, size: int = 16, channels: int = 3, classes: int = 4, seed: int = 0) -> tuple[Pixels, Pixels]:
    """Noisy images, (count, size, size, channels), with a bright row whose place tells the class; and the classes."""
    random = np.random.default_rng(seed)
    labels = np.sort(np.arange(count) % classes)
    pixels = random.integers(0, 120, (count, size, size, channels))
    pixels[np.arange(count), size // 4 + 2 * labels] += 120
    return pixels.astype(np.uint8), labels.astype(np.uint8)


def write_decoded(folder: Path, splits: Mapping[str, tuple[Pixels, Pixels]], classes: int = 4) -> Path:
    """Write the images and labels of "train" and "val" as a data folder."""
    folder.mkdir(parents=True)
    ids = [f"class-{label}" for label in range(classes)]
    indices: dict[str, Index] = {}
    pieces = []
    for split, (pixels, labels) in splits.items():
        content = np.ascontiguousarray(pixels).tobytes()
        (folder / packed_file(split)).write_bytes(content)
        pieces.append(Piece(split=split, bytes=len(content), sha256=hashlib.sha256(content).hexdigest()))
        names = [f"{number:06d}" for number in range(len(pixels))]
        sizes = [len(content) // max(1, len(pixels))] * len(pixels)
        indices[split] = build_index(labels.tolist(), names, sizes)
        write_index(folder / index_file(split), indices[split], ids)
    digests = {split: hashlib.sha256((folder / index_file(split)).read_bytes()).hexdigest() for split in splits}
    counts = {split: np.bincount(labels, minlength=classes).tolist() for split, (_, labels) in splits.items()}
    manifest = ImageManifest(
        dataset="test",
        importer="images",
        recipe={},
        layout="decoded",
        image_shape=splits["train"][0].shape[1:],
        revision=None,
        source_folder=str(folder),
        source_files=(),
        pieces=tuple(pieces),
        train_index=digests["train"],
        validation_index=digests["val"],
        fingerprint=fingerprint(ids, indices.values()),
        classes=tuple(
            ClassEntry(id=each, name=each, train=counts["train"][label], validation=counts["val"][label])
            for label, each in enumerate(ids)
        ),
    )
    write_image_manifest(folder, manifest)
    return folder
