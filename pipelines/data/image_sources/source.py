"""From the SOURCE of `asgo data images` to its importer."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

from pipelines.data.image_sources.files_importer import FilesImporter
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
    importer: TorchvisionImporter | FilesImporter
    checked: Collection[str] = ()
    if source.startswith(TORCHVISION):
        _require_only(options, source, "root", "download")
        importer = TorchvisionImporter(source.removeprefix(TORCHVISION), options.root or ROOT)
        if options.download:
            checked = importer.download(report, notify)
    else:
        _require_only(options, source, "val_fraction", "skip_bad", "extract")
        importer = _files_importer(source, out, options, notify)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of unusual but readable files
        return import_images(
            importer, out, extract=options.extract, workers=workers, overwrite=overwrite, checked=checked, report=report
        )


def _require_only(options: SourceOptions, source: str, *allowed: str) -> None:
    for name, value in asdict(options).items():
        if name not in allowed and value not in (None, False):
            raise UsageError(f"--{name.replace('_', '-')}: not an option for {source}; omit it")


def _files_importer(source: str, out: Path, options: SourceOptions, notify: Notify) -> FilesImporter:
    path = Path(source)
    if not path.exists():
        raise UsageError(
            f"{source}: no such folder or archive; a data set of torchvision is called {TORCHVISION}NAME, as in "
            f"{TORCHVISION}CIFAR10"
        )
    if holds_images(path):
        raise UsageError(f"{source}: already a folder of `asgo data`; train on it with --data {source}")
    if path.is_dir() and out.resolve().is_relative_to(path.resolve()):
        raise UsageError(f"--out {out}: this folder is in the source {source}; choose another one")
    return FilesImporter(path, notify, val_fraction=options.val_fraction, skip_bad=options.skip_bad)
