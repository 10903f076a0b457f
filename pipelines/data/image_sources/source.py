"""From the SOURCE of `asgo data images` to its importer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipelines.data.image_sources.torchvision_sets import PREFIX as TORCHVISION
from pipelines.data.image_sources.torchvision_sets import TorchvisionImporter
from pipelines.data.images.importing import import_images
from pipelines.data.images.manifest import ImageManifest
from pipelines.data.progress import Progress
from pipelines.data.retries import Notify
from pipelines.errors import UsageError


@dataclass(frozen=True)
class SourceOptions:
    """Options that say how to read a source."""

    root: Path
    download: bool = False


def prepare_images(
    source: str,
    out: Path,
    options: SourceOptions,
    *,
    extract: bool | None,
    workers: int | None,
    overwrite: bool,
    report: Progress,
    notify: Notify,
) -> ImageManifest:
    """Create `out` from `source`, or resume that; downloads missing files first if the options say so.

    Raises as `import_images` does, and `UsageError` for an unknown kind of source.
    """
    importer = _importer(source, options)
    if extract is not None and isinstance(importer, TorchvisionImporter):
        raise UsageError(f"{source}: holds pixels, not image files; omit --extract and --no-extract")
    checked = importer.download(report, notify) if options.download else ()
    return import_images(
        importer, out, extract=extract, workers=workers, overwrite=overwrite, checked=checked, report=report
    )


def _importer(source: str, options: SourceOptions) -> TorchvisionImporter:
    if source.startswith(TORCHVISION):
        return TorchvisionImporter(source.removeprefix(TORCHVISION), options.root)
    raise UsageError(f"{source}: unknown kind of source")
