"""From the SOURCE of `asgo data images` to its importer."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path

from pipelines.data.image_sources.files_importer import FilesImporter
from pipelines.data.image_sources.hub import PREFIX as HUB
from pipelines.data.image_sources.hub import Choice, HubImporter
from pipelines.data.image_sources.torchvision_files import FILE_SETS, TorchvisionFilesImporter
from pipelines.data.image_sources.torchvision_sets import PREFIX as TORCHVISION
from pipelines.data.image_sources.torchvision_sets import TorchvisionImporter
from pipelines.data.images.importing import import_images
from pipelines.data.images.manifest import ImageManifest, holds_images
from pipelines.data.progress import Progress
from pipelines.data.retries import Notify
from pipelines.errors import UsageError

ROOT = Path("data/sources")


@dataclass(frozen=True)
class SourceOptions:
    """Options of a source; each kind of source has some of them."""

    root: Path | None = None
    download: bool = False
    val_fraction: float | None = None
    skip_bad: bool = False
    image_column: str | None = None
    label_column: str | None = None
    extract: bool | None = None


def prepare_images(
    source: str,
    out: Path,
    options: SourceOptions,
    *,
    workers: int | None,
    overwrite: bool,
    report: Progress,
    notify: Notify,
) -> ImageManifest:
    """Create `out` from `source`, or resume that; downloads missing files first if the options say so.

    Raises as `import_images` does, and `UsageError` for an unknown kind of source and for options that it lacks.
    """
    importer = _importer(source, out, options, notify)
    checked: Collection[str] = ()
    if options.download and isinstance(importer, (TorchvisionImporter, TorchvisionFilesImporter, HubImporter)):
        checked = importer.download(report, notify)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of unusual but readable files
        return import_images(
            importer, out, extract=options.extract, workers=workers, overwrite=overwrite, checked=checked, report=report
        )


def _importer(
    source: str, out: Path, options: SourceOptions, notify: Notify
) -> TorchvisionImporter | HubImporter | FilesImporter:
    fraction = options.val_fraction
    if fraction is not None and not 0 < fraction < 1:
        raise UsageError(f"--val-fraction should be between 0 and 1, not {fraction:g}")
    name = source.removeprefix(TORCHVISION)
    if name != source and name in FILE_SETS:
        _require_only(options, source, "root", "download", "val_fraction", "skip_bad", "extract")
        root = options.root or ROOT
        return TorchvisionFilesImporter(name, root, notify, val_fraction=fraction, skip_bad=options.skip_bad)
    if name != source:
        _require_only(options, source, "root", "download")
        return TorchvisionImporter(name, options.root or ROOT)
    if source.startswith(HUB):
        columns = ("image_column", "label_column")
        _require_only(options, source, "root", "download", "val_fraction", "skip_bad", "extract", *columns)
        choice = Choice(options.image_column, options.label_column, fraction, options.skip_bad)
        return HubImporter(source.removeprefix(HUB), options.root or ROOT, choice, notify)
    _require_only(options, source, "val_fraction", "skip_bad", "extract")
    return _files_importer(source, out, options, notify)


def _require_only(options: SourceOptions, source: str, *allowed: str) -> None:
    for field in fields(options):
        if field.name not in allowed and getattr(options, field.name) != field.default:
            option = "extract and --no-extract" if field.name == "extract" else field.name.replace("_", "-")
            raise UsageError(f"--{option}: not for {source}; omit it")


def _files_importer(source: str, out: Path, options: SourceOptions, notify: Notify) -> FilesImporter:
    path = Path(source)
    if not path.exists():
        raise UsageError(
            f"{source}: no such folder or archive; data sets of torchvision are called {TORCHVISION}NAME, those of the "
            f"hub {HUB}OWNER/NAME"
        )
    if holds_images(path):
        raise UsageError(f"{source}: already a folder of `asgo data`; train on it with --data")
    if path.is_dir() and out.resolve().is_relative_to(path.resolve()):
        raise UsageError(f"--out {out}: this folder is in the source {source}; choose another one")
    return FilesImporter(path, notify, val_fraction=options.val_fraction, skip_bad=options.skip_bad)
