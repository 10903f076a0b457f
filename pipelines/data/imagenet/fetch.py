"""One file over HTTP(S), whatever happens to the connection or to this process on the way."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from pipelines.data.failure import Failure
from pipelines.data.imagenet.archives import Archive, Progress
from pipelines.data.imagenet.client import BY_HAND, Answer, get, without_login
from pipelines.data.retries import Failed, Patience
from pipelines.errors import AsgoError
from pipelines.storage import parse_json, refusing_links, sync, write_atomically

_PIECE = 1 << 20
_SMALL = 1 << 20
_CHANGED = "the file on the server is another now"


@dataclass(frozen=True)
class _Note:
    """What is known of the file whose beginning is there, kept beside it for the next process."""

    url: str
    length: int | None = None
    etag: str | None = None
    modified: str | None = None

    @property
    def condition(self) -> str | None:
        """The value of `If-Range`, for which weak entity tags may not be taken."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.modified


def partial_path(target: Path) -> Path:
    """Where the beginning of a file is kept until the whole of it is there and right."""
    return target.with_name(f"{target.name}.partial")


def fetch_small(url: str, patience: Patience) -> bytes | None:
    """A file of at most 1 MiB; None if the server has none. Raises as `Patience.failed` does."""
    while True:
        body = bytearray()
        try:
            for message in patience.messages(partial(get, url, {})):
                patience.answered()
                if isinstance(message, bytes):
                    body += message
                if len(body) > _SMALL or (isinstance(message, Answer) and message.is_page):
                    return None
            return bytes(body)
        except Failed as error:
            if error.status in (403, 404, 410):
                return None
            patience.failed(without_login(url), error)


def require_space(folder: Path, needed: int) -> None:
    """Raise `AsgoError` unless the disk of `folder` has room for `needed` bytes more."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise AsgoError(
            f"{folder}: {needed / 1e9:,.1f} GB are still to come and {free / 1e9:,.1f} GB are free; "
            f"make room for {(needed - free) / 1e9:,.1f} GB more, or choose another --archives"
        )


class Fetch:
    """Brings the file at `url` to `target`, by way of `target.partial`, whose bytes are never asked for twice.

    Raises from `run`: `AsgoError` as `Patience.failed` does, for another length or MD5 than those of `archive`, and
    for a disk that fails; `RunInterrupted`, also when `progress` raises it. What has come is kept in all cases but a
    wrong MD5.
    """

    def __init__(self, url: str, target: Path, archive: Archive, progress: Progress, patience: Patience) -> None:
        self._url = url
        self._place = without_login(url)
        self._target = target
        self._partial = partial_path(target)
        self._note_path = target.with_name(f"{self._partial.name}.json")
        self._archive = archive
        self._progress = progress
        self._patience = patience
        self._note = self._read_note()
        self._length = archive.bytes or self._note.length
        self._digest = hashlib.md5(usedforsecurity=False)
        self._position = 0
        self._farthest = 0

    def run(self) -> None:
        """Download, check and rename."""
        try:
            with open(self._partial, "ab", buffering=0, opener=refusing_links) as file:
                self._take_up()
                while self._length is None or self._position < self._length:
                    self._attempt(file)
            self._finish()
        except OSError as error:
            raise AsgoError(
                f"{error.filename or self._partial}: {error.strerror}; "
                "what is here is kept: the same command goes on when that is put right"
            ) from None
        finally:
            self._remove_if_empty()

    def _take_up(self) -> None:
        """Compute the digest of what is there."""
        size = self._partial.stat().st_size
        if self._length is not None and size > self._length:
            self._patience.notify(f"{self._partial.name}: longer than {self._target.name} may be; it begins again")
            self._discard()
            return
        with self._partial.open("rb") as file:
            while piece := file.read(_PIECE):
                self._digest.update(piece)
                self._position += len(piece)
                self._progress(f"checking {self._partial.name}", self._position, size)
        self._farthest = self._position

    def _attempt(self, file: BinaryIO) -> None:
        try:
            for message in self._patience.messages(partial(get, self._url, self._range_headers())):
                if isinstance(message, Answer):
                    self._patience.answered()
                    self._heed(message)
                else:
                    self._append(file, message)
            self._require_end()
        except Failed as error:
            if error.status == 416:
                self._discard()
            self._patience.failed(self._target.name, error)

    def _require_end(self) -> None:
        if self._length is None:
            self._length = self._position
        if self._position < self._length:
            missing = self._length - self._position
            raise Failed(Failure(f"the connection ended {missing:,} bytes before the end", "unreachable"))

    def _range_headers(self) -> dict[str, str]:
        if self._position == 0:
            return {}
        # Another server may have another tag for the same bytes; of these the digest decides.
        condition = self._note.condition if self._note.url == self._place else None
        return {"Range": f"bytes={self._position}-"} | ({"If-Range": condition} if condition else {})

    def _heed(self, answer: Answer) -> None:
        """Check that the answer is the rest of the file, or the whole of it, in which case what is there goes."""
        self._check_kind(answer)
        if answer.start == 0 and self._position > 0:
            why = "the server cannot go on in the middle" if self._is_noted(answer) else _CHANGED
            self._patience.notify(f"{self._target.name}: {why}; it begins again")
            self._discard()
        elif answer.start != self._position:
            raise Failed(Failure("the server sends another part than was asked for", "refused for now"))
        elif self._position > 0 and self._has_changed(answer):
            self._discard()
            raise Failed(Failure(f"{_CHANGED}; it begins again", "refused for now"))
        self._length = self._archive.bytes or answer.length
        require_space(self._target.parent, (self._length or 0) - self._position)
        note = _Note(self._place, answer.length, answer.etag, answer.modified)
        if note != self._note:
            write_atomically(self._note_path, json.dumps(vars(note)).encode())
            self._note = note

    def _check_kind(self, answer: Answer) -> None:
        expected = self._archive.bytes
        if answer.is_page:
            raise AsgoError(
                f"{self._place}: the server sends a web page and not the file; it may ask for a login: {BY_HAND}"
            )
        if expected is not None and answer.length not in (None, expected):
            raise AsgoError(
                f"{self._place}: {answer.length:,} bytes long, and the right file has {expected:,}; "
                "give another --base-url"
            )

    def _has_changed(self, answer: Answer) -> bool:
        """Whether a server that was told a condition goes on with another file all the same."""
        if self._length is not None and answer.length not in (None, self._length):
            return True
        is_same_place = self._note.url == self._place
        return is_same_place and self._note.condition is not None and not self._is_noted(answer)

    def _is_noted(self, answer: Answer) -> bool:
        noted = (self._note.url, self._note.etag, self._note.modified)
        return noted == (self._place, answer.etag, answer.modified)

    def _append(self, file: BinaryIO, piece: bytes) -> None:
        if self._length is not None and self._position + len(piece) > self._length:
            raise AsgoError(f"{self._place}: longer than {self._length:,} bytes; give another --base-url")
        rest = memoryview(piece)
        while rest:
            rest = rest[file.write(rest) :]
        self._digest.update(piece)
        self._position += len(piece)
        if self._position > self._farthest:
            self._farthest = self._position
            self._patience.advanced()
        self._progress(f"downloading {self._target.name}", self._position, self._length or self._position)

    def _discard(self) -> None:
        """Begin again. The file goes before its note does, so that no note is ever taken for that of other bytes."""
        open(self._partial, "wb", opener=refusing_links).close()
        self._note_path.unlink(missing_ok=True)
        self._note = _Note(self._place)
        self._digest = hashlib.md5(usedforsecurity=False)
        self._position = 0
        self._length = self._archive.bytes

    def _finish(self) -> None:
        if self._digest.hexdigest() != self._archive.md5:
            self._partial.unlink()
            self._note_path.unlink(missing_ok=True)
            raise AsgoError(
                f"{self._target.name}: what came from {self._place} has the MD5 {self._digest.hexdigest()}, not "
                f"{self._archive.md5}, and is removed; run the same command again, or give another --base-url"
            )
        sync(self._partial)
        self._partial.replace(self._target)
        sync(self._target.parent)
        self._note_path.unlink(missing_ok=True)

    def _remove_if_empty(self) -> None:
        with contextlib.suppress(OSError):
            if self._partial.stat().st_size == 0:
                self._partial.unlink()

    def _read_note(self) -> _Note:
        with contextlib.suppress(OSError, ValueError, TypeError):
            return _Note(**parse_json(self._note_path.read_bytes()))
        return _Note(self._place)
