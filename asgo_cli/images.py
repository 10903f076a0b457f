"""`asgo data images`: import a data set of labelled images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asgo_cli import console
from asgo_cli.help_text import examples
from asgo_cli.progress import PhaseProgress
from pipelines.shell import command

if TYPE_CHECKING:
    from pipelines.data.images.manifest import ImageManifest

EXAMPLES = examples(
    "asgo data images photos --out data/photos",
    "asgo data images photos.zip --val-fraction 0.2 --out data/photos",
    "asgo data images torchvision:MNIST --root /data/tv --out data/mnist",
    "asgo data images torchvision:CIFAR10 --download --out data/cifar10",
    "asgo data images hub:zh-plus/tiny-imagenet --download --out data/tiny",
)

SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="A folder of images, an archive of one (.zip, .tar, .tar.gz), torchvision:NAME, or hub:OWNER/NAME.",
    ),
]
OutOption = Annotated[Path, typer.Option(metavar="FOLDER", help="The data folder to create.")]
ValFractionOption = Annotated[
    float | None,
    typer.Option(
        metavar="X", help="Fraction of each class for validation, if SOURCE has no split.", show_default="0.1"
    ),
]
SkipBadOption = Annotated[bool, typer.Option("--skip-bad", help="Leave out files that are no images, or damaged.")]
RootOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Folder of the files of torchvision (its `root`; for CIFAR, of the binary version) and of the hub.",
        show_default="data/sources",
    ),
]
DownloadOption = Annotated[bool, typer.Option("--download", help="Download missing files.")]
ImageColumnOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="Column of images, for the hub.", show_default="the only one")
]
LabelColumnOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="Column of labels, for the hub.", show_default="the only one")
]
ExtractOption = Annotated[
    bool | None,
    typer.Option(
        "--extract/--no-extract",
        help="One file per image, or packed: in the archive, or one file per split.",
        show_default="packed; pixels for small images of one size",
    ),
]
WorkersOption = Annotated[
    int | None, typer.Option(metavar="N", help="Threads that extract.", show_default="one per core")
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an existing data folder.")]


def images(
    source: SourceArgument,
    out: OutOption,
    val_fraction: ValFractionOption = None,
    skip_bad: SkipBadOption = False,
    root: RootOption = None,
    download: DownloadOption = False,
    image_column: ImageColumnOption = None,
    label_column: LabelColumnOption = None,
    extract: ExtractOption = None,
    workers: WorkersOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Prepare a folder of labelled images to train from.

    A folder has train/CLASS/IMAGE and val/CLASS/IMAGE, or CLASS/IMAGE, which is split; Kaggle's ImageNet works too.
    After an interruption, run the same command again to resume.
    """
    progress = PhaseProgress()
    with progress.bar:
        manifest = prepare(
            source,
            out,
            progress,
            workers=workers,
            overwrite=overwrite,
            root=root,
            download=download,
            val_fraction=val_fraction,
            skip_bad=skip_bad,
            image_column=image_column,
            label_column=label_column,
            extract=extract,
        )
    summarize(manifest, out)
    console.suggest_next(command("asgo", "train", "images", "--data", out))


def prepare(
    source: str, out: Path, progress: PhaseProgress, *, workers: int | None, overwrite: bool, **options: Any
) -> ImageManifest:
    """Import `source`; `options` are fields of `SourceOptions`."""
    from pipelines.data.image_sources.source import SourceOptions, prepare_images

    return prepare_images(
        source,
        out,
        SourceOptions(**options),
        workers=workers,
        overwrite=overwrite,
        report=progress.show,
        notify=console.say,
    )


def summarize(manifest: ImageManifest, out: Path) -> None:
    """Show the number of images of each split."""
    rows = []
    for part in ("train", "validation"):
        counts = [getattr(each, part) for each in manifest.classes]
        rows.append((part, f"{len(counts):,}", f"{sum(counts):,}", f"{min(counts):,}", f"{max(counts):,}"))
    in_place = manifest.source_folder if manifest.containers else f"{out}/*.images"
    place = "files" if manifest.layout == "extracted" else f"in {in_place}"
    console.show_table(("part", "classes", "images", "fewest", "most"), rows, title=f"{out} ({place})")
