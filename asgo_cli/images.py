"""`asgo data images`: import a data set of labelled images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from asgo_cli import console
from asgo_cli.help_text import examples
from asgo_cli.progress import PhaseProgress
from pipelines.shell import command

if TYPE_CHECKING:
    from pipelines.data.images.manifest import ImageManifest

EXAMPLES = examples(
    "asgo data images torchvision:MNIST --root /data/torchvision --out data/mnist",
    "asgo data images torchvision:CIFAR10 --download --out data/cifar10",
)


def images(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="torchvision:NAME, a data set of torchvision."),
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="The data folder to create.")],
    root: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder of torchvision's files, its `root`.")] = Path(
        "data/torchvision"
    ),
    download: Annotated[bool, typer.Option("--download", help="Download missing files.")] = False,
    extract: Annotated[
        bool | None,
        typer.Option(
            "--extract/--no-extract",
            help="One file per image, or packed: in the archive, or one file per split.",
            show_default="packed; pixels for small images of one size",
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="Threads that read and write.", show_default="one per core")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing data folder.")] = False,
) -> None:
    """Prepare a folder of labelled images to train from.

    After an interruption, run the same command again to resume.
    """
    from pipelines.data.image_sources.source import SourceOptions, prepare_images

    progress = PhaseProgress()
    with progress.bar:
        manifest = prepare_images(
            source,
            out,
            SourceOptions(root, download),
            extract=extract,
            workers=workers,
            overwrite=overwrite,
            report=progress.show,
            notify=console.say,
        )
    summarize(manifest, out)
    console.suggest_next(command("asgo", "train", "images", "--data", out))


def summarize(manifest: ImageManifest, out: Path) -> None:
    """Show the number of images of each split."""
    rows = []
    for part in ("train", "validation"):
        counts = [getattr(each, part) for each in manifest.classes]
        rows.append((part, f"{len(counts):,}", f"{sum(counts):,}", f"{min(counts):,}", f"{max(counts):,}"))
    in_place = manifest.source_folder if manifest.containers else f"{out}/*.images"
    place = "files" if manifest.layout == "extracted" else f"in {in_place}"
    console.show_table(("part", "classes", "images", "fewest", "most"), rows, title=f"{out} ({place})")
