"""`asgo data imagenet`: download, verify, and extract or index ImageNet's archives or the hub's copy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from asgo_cli import console, images
from asgo_cli.help_text import examples
from asgo_cli.progress import PhaseProgress
from pipelines.shell import command

if TYPE_CHECKING:
    from collections.abc import Collection

    from pipelines.data.images.manifest import ImageManifest

EXAMPLES = examples(
    "asgo data imagenet --archives /data/archives",
    "asgo data imagenet --archives /data/archives --download",
    "asgo data imagenet --archives /data/archives --no-extract    # read in place",
    "asgo data imagenet --source hub --archives /data/hub --download",
)

Source = Literal["archives", "hub", "folder"]


def imagenet(
    archives: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Folder of the archives, of the hub's files, or of images.")
    ],
    source: Annotated[
        Source,
        typer.Option(
            help="ILSVRC2012's three archives, the hub's gated copy of the same images, or a folder of image files, "
            "such as Kaggle's, as for `asgo data images`."
        ),
    ] = "archives",
    out: images.OutOption = Path("data/imagenet"),
    download: Annotated[
        bool, typer.Option("--download", help="Download missing files; ImageNet's terms apply.")
    ] = False,
    base_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Server to download the archives from.",
            show_default="https://image-net.org/data/ILSVRC/2012/",
        ),
    ] = None,
    extract: Annotated[
        bool,
        typer.Option(
            "--extract/--no-extract", help="One file per image, or packed: in the archives, or one file per split."
        ),
    ] = True,
    workers: images.WorkersOption = None,
    overwrite: images.OverwriteOption = False,
) -> None:
    """Prepare a folder of ImageNet to train from.

    Checks the archives by the official MD5s, or by a file md5sums.txt beside them, and the hub's files by the hub's
    listing. After an interruption, run the same command again to resume.
    """
    from pipelines.errors import UsageError

    if source != "archives" and base_url is not None:
        raise UsageError("--base-url: only for the archives; set HF_ENDPOINT to use a mirror of the hub")
    if source == "folder" and download:
        raise UsageError("--download: not for a folder of image files; omit it")
    progress = PhaseProgress()
    with progress.bar:
        common: dict[str, Any] = {"extract": extract, "workers": workers, "overwrite": overwrite}
        if source == "folder":
            manifest = images.prepare(str(archives.absolute()), out, progress, **common)
        else:
            manifest = _prepare(archives, out, source, progress, download=download, base_url=base_url, **common)
    images.summarize(manifest, out)
    console.suggest_next(command("asgo", "train", "imagenet", "--data", out))


def _prepare(
    archives: Path,
    out: Path,
    source: Literal["archives", "hub"],
    progress: PhaseProgress,
    *,
    download: bool,
    base_url: str | None,
    **options: Any,
) -> ImageManifest:
    from pipelines.data.imagenet.importer import prepare_imagenet

    checked: Collection[str] = ()
    if download and source == "hub":
        checked = _download_hub_copy(archives, progress)
    elif download:
        checked = _download_archives(archives, base_url, progress)
    return prepare_imagenet(archives, out, origin=source, checked=checked, report=progress.show, **options)


def _download_archives(folder: Path, base_url: str | None, progress: PhaseProgress) -> Collection[str]:
    """Download missing archives; return the names of the verified ones."""
    from pipelines.data.imagenet.archives import ARCHIVES
    from pipelines.data.imagenet.download import BASE_URL, download_archives

    missing = {key: each.file for key, each in ARCHIVES.items() if not (folder / each.file).exists()}
    if missing:
        _show_terms()
        download_archives(folder, base_url or BASE_URL, list(missing), progress=progress.show, notify=console.say)
    return missing.values()


def _download_hub_copy(folder: Path, progress: PhaseProgress) -> Collection[str]:
    """Download missing files of the hub; return the names of the verified ones."""
    from pipelines.data.hub_copy import is_whole, load_listing
    from pipelines.data.imagenet.hub import download_hub_copy

    if is_whole(folder):
        return ()
    _show_terms()
    download_hub_copy(folder, progress=progress.show, notify=console.say)
    listing = load_listing(folder)
    return () if listing is None else [file.path for file in listing.files]


def _show_terms() -> None:
    from pipelines.data.imagenet.download import LICENCE_TERMS

    for line in LICENCE_TERMS.splitlines():
        console.say(line)
