"""Prepare a folder to train from, from ImageNet's archives or the hub's copy; verifies the source."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pipelines.data.imagenet.archives import ArchiveImporter
from pipelines.data.imagenet.hub_files import HubImporter
from pipelines.data.images.importing import ImageImporter, import_images
from pipelines.data.images.manifest import ImageManifest

Origin = Literal["archives", "hub"]


def prepare_imagenet(folder: Path, out: Path, *, origin: Origin = "archives", **options: Any) -> ImageManifest:
    """Create `out` from the files in `folder`: the three archives, or the files of `download_hub_copy`.

    Packed images stay in the archives, or are copied from the hub's files to one file per split. `options` and errors
    are those of `import_images`.
    """
    importer: ImageImporter = ArchiveImporter(folder) if origin == "archives" else HubImporter(folder)
    return import_images(importer, out, **options)
