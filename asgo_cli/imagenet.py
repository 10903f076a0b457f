"""`asgo data imagenet`: the archives of ImageNet, fetched, checked, and extracted or read in place."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from asgo_cli import console

if TYPE_CHECKING:
    from pipelines.data.imagenet.manifest import ImagenetManifest

EXAMPLES = (
    "Examples: `asgo data imagenet --archives /data/archives`; to fetch them first `asgo data imagenet --archives "
    "/data/archives --download`; to leave the images in the archives `asgo data imagenet --archives /data/archives "
    "--no-extract`."
)

_SECONDS_BETWEEN_LINES = 10.0


def imagenet(
    archives: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where ILSVRC2012's three archives are, or are to be.")
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="The data folder to make.")] = Path("data/imagenet"),
    download: Annotated[
        bool, typer.Option("--download", help="Fetch the archives that are missing; ImageNet's terms apply.")
    ] = False,
    base_url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Where from.", show_default="https://image-net.org/data/ILSVRC/2012/"),
    ] = None,
    extract: Annotated[
        bool, typer.Option("--extract/--no-extract", help="Make files, or read the images in the archives.")
    ] = True,
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="Threads that extract.", show_default="one a processor")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a data folder that is already there.")
    ] = False,
) -> None:
    """Make a folder of ImageNet to train from.

    The archives are checked by their MD5, or by a file md5sums.txt beside them. Killed at any moment, the same command
    goes on where it was.
    """
    from pipelines.data.imagenet.archives import ARCHIVES
    from pipelines.data.imagenet.download import BASE_URL, LICENCE_TERMS, download_archives
    from pipelines.data.imagenet.prepare import prepare_imagenet

    progress = _BytesProgress()
    missing = [key for key, archive in ARCHIVES.items() if not (archives / archive.file).exists()]
    with progress.bar:
        if download and missing:
            for line in LICENCE_TERMS.splitlines():
                console.say(line)
            download_archives(archives, base_url or BASE_URL, missing, progress=progress.show, notify=console.say)
        manifest = prepare_imagenet(
            archives,
            out,
            extract=extract,
            workers=workers,
            overwrite=overwrite,
            checked=missing if download else (),
            report=progress.show,
        )
    _summarize(manifest, out)
    console.suggest_next(f"asgo train imagenet --data {shlex.quote(str(out))}")


def _summarize(manifest: ImagenetManifest, out: Path) -> None:
    rows = []
    for part in ("train", "validation"):
        counts = [getattr(each, part) for each in manifest.classes]
        rows.append((part, f"{len(counts):,}", f"{sum(counts):,}", f"{min(counts):,}", f"{max(counts):,}"))
    place = "files" if manifest.layout == "extracted" else f"in {manifest.archives_folder}"
    console.show_table(("part", "classes", "images", "fewest", "most"), rows, title=f"{out} ({place})")


class _BytesProgress:
    """A bar on a terminal, while `bar` is entered; a line now and then elsewhere."""

    def __init__(self) -> None:
        self._last_line_s = time.monotonic()
        self._phase = ""
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=console.words,
            transient=True,
            disable=not console.words.is_terminal,
        )
        self._task = self.bar.add_task("", total=None)

    def show(self, phase: str, done: int, total: int) -> None:
        """Move the bar."""
        if phase != self._phase:
            self._phase = phase
            self.bar.reset(self._task)
        self.bar.update(self._task, description=phase, completed=done, total=total or None)
        now = time.monotonic()
        if not console.words.is_terminal and now - self._last_line_s >= _SECONDS_BETWEEN_LINES:
            self._last_line_s = now
            console.say(f"{phase}: {done / total:.1%}" if total else phase)
