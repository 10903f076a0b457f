"""The archives of ImageNet from its own server or a mirror into a folder, checked as they come, and resumable."""

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
ImageNet is not free for every use. Whoever downloads it agrees with Princeton and Stanford Universities to its terms
of access, in short:
  - for research without commercial aims, and for teaching, only;
  - the pictures belong to their makers; no right in them is given, and nothing is warranted;
  - whoever uses it answers for that use, and for claims that come of it;
  - colleagues may have access when they have agreed to the same terms; it is not passed on otherwise;
  - who works for a company binds that company too; access may be ended at any time.
The terms themselves, which alone are binding: https://image-net.org/download.php
"""
"""For people, before anything is downloaded."""

_BY_HAND = (
    "ask for access at https://image-net.org/download-images.php and download the archives by hand: "
    "those that lie in --archives are used as they are"
)
_ADVICE = Advice(
    no_access=f"ImageNet is given to those who agree to its terms; {_BY_HAND}",
    elsewhere="give another --base-url",
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
    """Bring the archives `names` (keys of `ARCHIVES`) into `folder`, or go on where an earlier call was ended.

    Those that are there are checked and left alone. A mirror that has an `md5sums.txt` may serve other archives than
    the official ones; it is kept in the folder. `progress` is called often, `notify` with a line for each archive that
    is there and each failure that is survived.

    Raises:
        UsageError: `base_url` is no address, a file is in the place of `folder`, or another process works in it.
        RunInterrupted: SIGTERM or SIGINT; the same call goes on.
        AsgoError: no network, a server that refuses or fails again and again, another length or MD5, a full disk. What
            has come is kept in `NAME.partial`, unless its MD5 is wrong, and the same call goes on.
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
                notify(f"{archive.file}: there already, and right")
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
    """What a mirror says of its archives; without a list of its own it has the official ones."""
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
    """Bytes; 0 where the length is not known yet."""
    begun = partial_path(folder / archive.file)
    here = begun.stat().st_size if begun.exists() else 0
    return max(0, (archive.bytes or 0) - here)
