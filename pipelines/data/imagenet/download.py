"""Download the archives of ImageNet from its own server or a mirror; verifies and resumes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urljoin

from pipelines.data.download import (
    Advice,
    Download,
    check_url,
    fetch_small,
    partial_path,
    require_space,
    without_login,
)
from pipelines.data.holding import held_folder
from pipelines.data.imagenet.archives import (
    ARCHIVES,
    MD5SUMS,
    Archive,
    check_archive,
    expected_archives,
    parse_md5sums,
)
from pipelines.data.progress import Progress
from pipelines.data.retries import Notify, Retries
from pipelines.errors import AsgoError, UsageError
from pipelines.stopping import stop_on_signals
from pipelines.storage import write_atomically

BASE_URL = "https://image-net.org/data/ILSVRC/2012/"
LICENCE_TERMS = """\
ImageNet is not free for every use. By downloading it you agree with Princeton and Stanford Universities to its terms
of access. In short:
  - use it only for non-commercial research and for teaching;
  - the images belong to their makers; you get no rights in them, and no warranty;
  - you are responsible for your use, and for claims that arise from it;
  - give access only to colleagues who have agreed to the same terms;
  - if you work for a company, you bind the company too; access may be ended at any time.
Only the full terms are binding: https://image-net.org/download.php
"""
"""Shown before anything is downloaded."""

_BY_HAND = (
    "request access at https://image-net.org/download-images.php and download the archives by hand "
    "to the folder of --archives"
)
_ADVICE = Advice(
    no_access=f"ImageNet requires agreement to its terms; {_BY_HAND}",
    elsewhere="pass another --base-url",
    by_hand=_BY_HAND,
)


def download_archives(
    folder: Path,
    base_url: str = BASE_URL,
    names: Sequence[str] = tuple(ARCHIVES),
    *,
    progress: Progress,
    notify: Notify,
) -> None:
    """Download the archives `names` (keys of `ARCHIVES`) to `folder`, or resume an earlier call.

    Existing archives are verified and kept. A mirror with an `md5sums.txt` may serve other archives than the official
    ones; that file is stored in the folder. Calls `progress` often, and `notify` with one line per existing archive and
    per failure that is retried.

    Raises:
        UsageError: `base_url` is not an address, `folder` is a file, or another process works in it.
        RunInterrupted: SIGTERM or SIGINT; the same call resumes.
        AsgoError: no network, a server that refuses or keeps failing, another length or MD5, a full disk. The partial
            file is kept in `NAME.partial`, unless its MD5 is wrong, and the same call resumes.
    """
    base_url = check_url(base_url)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--archives {folder}: a file is in the way")
    with stop_on_signals() as stop, held_folder(folder):
        unreachable = f"check the network and --base-url {without_login(base_url)}, or {_BY_HAND}"
        retries = Retries(unreachable, notify, stop)
        progress = retries.stoppable(progress)
        archives = _wanted(folder, base_url, names, retries)
        missing = [archive for archive in archives if not (folder / archive.file).exists()]
        require_space(folder, sum(_still_to_come(folder, archive) for archive in missing))
        for archive in archives:
            if archive not in missing:
                check_archive(folder / archive.file, archive, progress)
                notify(f"{archive.file}: already downloaded and verified")
        for archive in missing:
            url = urljoin(base_url, archive.file)
            Download(
                url,
                folder / archive.file,
                length=archive.bytes,
                md5=archive.md5,
                advice=_ADVICE,
                progress=progress,
                retries=retries,
            ).run()


def _wanted(folder: Path, base_url: str, names: Sequence[str], retries: Retries) -> list[Archive]:
    archives = expected_archives(folder)
    if archives is ARCHIVES and base_url != BASE_URL and _lacks_any(folder, names):
        archives = _served_archives(folder, base_url, retries)
    return [archives[name] for name in names]


def _lacks_any(folder: Path, names: Sequence[str]) -> bool:
    return not all((folder / ARCHIVES[name].file).exists() for name in names)


def _served_archives(folder: Path, base_url: str, retries: Retries) -> Mapping[str, Archive]:
    """Return the archives of a mirror's `md5sums.txt`; without that file, the official ones."""
    url = urljoin(base_url, MD5SUMS)
    content = fetch_small(url, _ADVICE, retries)
    if content is None:
        return ARCHIVES
    archives = parse_md5sums(content.decode(errors="replace"), without_login(url))
    try:
        write_atomically(folder / MD5SUMS, content)
    except OSError as error:
        raise AsgoError(f"{error.filename}: {error.strerror}") from None
    return archives


def _still_to_come(folder: Path, archive: Archive) -> int:
    """Return the bytes left to download; 0 if the length is unknown."""
    partial_file = partial_path(folder / archive.file)
    done = partial_file.stat().st_size if partial_file.exists() else 0
    return max(0, (archive.bytes or 0) - done)
