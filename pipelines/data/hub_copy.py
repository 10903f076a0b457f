"""Copy files of a data set of the Hugging Face hub, also of a gated one with the user's own token, and check them."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import Field, NonNegativeInt, ValidationError

from pipelines.data.download import require_space
from pipelines.data.failure import Failure, failure_of
from pipelines.data.holding import held_folder
from pipelines.data.manifest import Frozen, Sha256
from pipelines.data.progress import Progress, digest_of
from pipelines.data.retries import Failed, Notify, Retries, Send
from pipelines.errors import AsgoError, UsageError
from pipelines.stopping import stop_on_signals
from pipelines.storage import write_atomically

LISTING = "hub.json"
"""File beside the hub's files: their listing on the hub when they were downloaded."""

_CONTACT_TIMEOUT_S = 5
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
_ENVIRONMENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",  # send no statistics
    "HF_XET_TELEMETRY_ENABLED": "0",
    "HF_XET_CHUNK_CACHE_SIZE_BYTES": "0",  # else, in some releases, the disk holds all data twice
}


class HubFile(Frozen):
    """A file of the repository: its path there, its length in bytes, and its SHA-256 if the hub lists it."""

    path: str
    bytes: NonNegativeInt
    sha256: Sha256 | None


class Listing(Frozen):
    """The files of the repository at a commit, as the hub lists them."""

    revision: str
    files: Annotated[tuple[HubFile, ...], Field(strict=False)]


@dataclass(frozen=True)
class Repository:
    """A data set of the hub: its name, the folder in it that is listed, or None for all, and the choice of files.

    `choose` returns the paths to copy. It raises `AsgoError` if there are none.
    """

    name: str
    under: str | None
    choose: Callable[[Sequence[str]], Sequence[str]]


def download_files(repository: Repository, folder: Path, *, progress: Progress, notify: Notify) -> str:
    """Download the chosen files to `folder`, under their paths, or resume; return the repository's commit.

    Existing files with the right SHA-256 are kept. The hub's listing is stored in `hub.json`.

    Raises:
        UsageError: `folder` is a file, or another process works in it.
        RunInterrupted: SIGTERM or SIGINT; the same call resumes with the same file.
        AsgoError: no network, no access, a hub that keeps failing, damaged files, a full disk.
    """
    for name, value in _ENVIRONMENT.items():  # before the import of huggingface_hub, which reads the environment
        os.environ.setdefault(name, value)
    from huggingface_hub.constants import ENDPOINT

    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: a file is in the way")
    with stop_on_signals() as stop, held_folder(folder):
        retries = Retries(f"check the network, or set HF_ENDPOINT to a mirror of {ENDPOINT}", notify, stop)
        progress = retries.stoppable(progress)
        listing = retries.call(repository.name, lambda: _list(repository, retries))
        _clear_leftovers(folder)
        missing = [file for file in listing.files if not _is_there(folder, file)]
        require_space(folder, sum(file.bytes for file in missing))
        write_atomically(folder / LISTING, listing.model_dump_json(indent=2).encode())
        for number, file in enumerate(listing.files, start=1):
            label = f"{Path(file.path).name} ({number} of {len(listing.files)})"
            _FileDownload(repository.name, folder, file, listing.revision, label, progress, retries).run()
        return listing.revision


def load_listing(folder: Path) -> Listing | None:
    """Return the listing of the last download to `folder`, or None. Raises `AsgoError` if it is damaged."""
    path = folder / LISTING
    try:
        return Listing.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError:
        raise AsgoError(f"{path}: damaged; remove it") from None


def is_whole(folder: Path) -> bool:
    """Whether `folder` holds all files of the last listing; compares only lengths."""
    listing = load_listing(folder)
    return listing is not None and all(_is_there(folder, file) for file in listing.files)


def listed_digest(folder: Path, path: Path) -> str | None:
    """Return the digest of a file of the last listing, such as "sha256:…"; None if unknown."""
    listing = load_listing(folder)
    files = () if listing is None else listing.files
    return next((f"sha256:{file.sha256}" for file in files if folder / file.path == path and file.sha256), None)


def check_file(folder: Path, path: Path, report: Progress) -> str:
    """Read all of a file and return its digest. Raises `AsgoError` if it is not that of the last listing."""
    digest = f"sha256:{digest_of(path, 'sha256', partial(report, f'checking {path.name}'))}"
    if listed_digest(folder, path) not in (None, digest):
        raise AsgoError(
            f"{path}: its SHA-256 is not the one that the hub lists; remove it and get it again with --download, "
            f"or remove {folder / LISTING} if the file is of another edition"
        )
    return digest


def _is_there(folder: Path, file: HubFile) -> bool:
    path = folder / file.path
    return path.exists() and path.stat().st_size == file.bytes


def _clear_leftovers(folder: Path) -> None:
    """Remove partial files of killed processes: their names are random, so they are never resumed."""
    for path in (folder / ".cache" / "huggingface" / "download").rglob("*.incomplete"):
        path.unlink()


def _list(repository: Repository, retries: Retries) -> Listing:
    listing: Listing = next(retries.messages(partial(_ask_for_listing, repository)))
    retries.answered()
    chosen = set(repository.choose([file.path for file in listing.files]))
    return listing.model_copy(update={"files": tuple(file for file in listing.files if file.path in chosen)})


def _ask_for_listing(repository: Repository, send: Send[Listing]) -> None:
    try:
        from huggingface_hub import HfApi, RepoFile

        api = HfApi()
        revision = str(api.dataset_info(repository.name, timeout=_CONTACT_TIMEOUT_S).sha)
        entries = api.list_repo_tree(
            repository.name,
            repository.under,
            recursive=repository.under is None,
            repo_type="dataset",
            revision=revision,
        )
        listed = [
            HubFile(path=each.path, bytes=each.size, sha256=each.lfs.sha256 if each.lfs else None)
            for each in entries
            if isinstance(each, RepoFile)
        ]
        send(Listing(revision=revision, files=tuple(sorted(listed, key=lambda file: file.path))))
    except Exception as error:
        raise Failed(failure_of(error, file=None, remote=True)) from error


@dataclass(frozen=True)
class _FileDownload:
    """Downloads one file to its path under `folder`; progress reports show `label`."""

    repository: str
    folder: Path
    file: HubFile
    revision: str
    label: str
    progress: Progress
    retries: Retries

    @property
    def target(self) -> Path:
        return self.folder / self.file.path

    def run(self) -> None:
        if self.target.exists():
            if self._is_right():
                return
            self.retries.notify(f"{self.target}: differs from the hub's file; downloading it again")
            self.target.unlink()
        self.retries.call(self.target.name, self._attempt)

    def _attempt(self) -> None:
        done = 0
        for message in self.retries.messages(
            partial(_fetch, self.repository, self.folder, self.file.path, self.revision)
        ):
            if isinstance(message, str):
                self.retries.notify(message)
            else:
                done += message
                self.retries.answered()
                self.progress(f"downloading {self.label}", min(done, self.file.bytes), self.file.bytes)
        if not self._is_right():
            self.target.unlink()
            raise Failed(Failure("the bytes differ from the hub's listing", "damaged"))
        self.retries.advanced()

    def _is_right(self) -> bool:
        if self.target.stat().st_size != self.file.bytes:
            return False
        if self.file.sha256 is None:
            return True
        report = partial(self.progress, f"checking {self.label}")
        return digest_of(self.target, "sha256", report) == self.file.sha256


def _fetch(repository: str, folder: Path, path: str, revision: str, send: Send[int | str]) -> None:
    """Download a file; send the number of bytes of each piece, and the library's warnings."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import logging as hub_logging
    from tqdm import tqdm

    class Meter(tqdm):  # type: ignore[misc]
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(disable=True)

        def update(self, n: float | None = 1) -> None:
            send(int(n or 0))

    logger = hub_logging.get_logger()
    logger.handlers, logger.propagate = [_Notices(send)], False
    try:
        hf_hub_download(repository, path, repo_type="dataset", revision=revision, local_dir=folder, tqdm_class=Meter)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _DISK:
            raise Failed(Failure(f"{error.strerror}; run the same command again to resume", "lasting")) from error
        raise Failed(failure_of(error, file=None, remote=True)) from error


class _Notices(logging.Handler):
    def __init__(self, send: Send[str]) -> None:
        super().__init__(logging.WARNING)
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        self._send(" ".join(record.getMessage().split()))
