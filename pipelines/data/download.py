"""Download one file over HTTP(S); resume after a lost connection or a killed process.

Uses the standard library's client: it depends on no other package (huggingface_hub has changed its HTTP library), does
not request compressed responses, and returns body data as soon as the socket has some.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import hashlib
import http.client
import json
import math
import re
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from pipelines.data import retries as limits
from pipelines.data.failure import Failure
from pipelines.data.progress import Progress
from pipelines.data.retries import Failed, Retries, Send
from pipelines.errors import AsgoError, UsageError
from pipelines.storage import parse_json, refusing_links, sync, write_atomically

_PIECE = 1 << 20
_SMALL = 1 << 20
_CHANGED = "the file on the server has changed"
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


@dataclass(frozen=True)
class Advice:
    """Advice in error messages: after HTTP 401 or 403, on another server, and on a manual download."""

    no_access: str
    elsewhere: str
    by_hand: str


@dataclass(frozen=True)
class Answer:
    """Headers of a response. `length` is the whole file's, in bytes; None if unknown."""

    start: int
    length: int | None
    etag: str | None
    modified: str | None
    is_page: bool


def check_url(url: str) -> str:
    """Return the base URL with a slash at its end. Raises `UsageError` unless it is http or https with a host."""
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address:
        raise UsageError(f"--base-url {url}: not an address that begins with http:// or https://")
    return url if url.endswith("/") else f"{url}/"


def without_login(url: str) -> str:
    """Return the URL without user name and password, fit for messages and files."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def get(url: str, headers: Mapping[str, str], advice: Advice, send: Send[Answer | bytes]) -> None:
    """Request `url` and pass the `Answer`, then the pieces of the body, to `send`.

    The body may end too early. Raises `Failed`.
    """
    request = urllib.request.Request(quote(without_login(url), safe="%/:=&?~#+!$,;'@()*[]"), headers=dict(headers))
    parts = urlsplit(url)
    if parts.username is not None:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
        # Unredirected: the hosts of redirects must not get the password.
        request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(login).decode()}")
    try:
        with urllib.request.urlopen(request, timeout=limits.STALL_S) as response:
            send(_answer(response))
            left = response.length
            while piece := response.read1(_PIECE if left is None else min(_PIECE, left)):
                send(piece)
                left = None if left is None else left - len(piece)
    except (OSError, http.client.HTTPException) as error:
        raise _failed(error, advice) from error
    except ValueError as error:  # http.client raises it for some host names
        raise Failed(Failure(f"no usable address ({error})", "lasting")) from error


def _answer(response: http.client.HTTPResponse) -> Answer:
    start, length = 0, response.length
    if response.status == 206:
        match = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if match is None:
            raise http.client.HTTPException("a partial response without a Content-Range")
        start, length = int(match[1]), None if match[2] == "*" else int(match[2])
    return Answer(
        start=start,
        length=length,
        etag=response.headers.get("ETag"),
        modified=response.headers.get("Last-Modified"),
        is_page=response.headers.get_content_type() == "text/html",
    )


def _failed(error: Exception, advice: Advice) -> Failed:
    if isinstance(error, urllib.error.HTTPError):
        return _refused(error, advice)
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, ssl.SSLCertVerificationError):
        return Failed(Failure(f"the server's certificate is not trusted ({reason.verify_message})", "lasting"))
    if isinstance(reason, TimeoutError):
        return Failed(Failure(f"no data for {limits.STALL_S:.0f} s", "unreachable"))
    text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
    return Failed(Failure(" ".join(text.split()), "unreachable"))


def _refused(error: urllib.error.HTTPError, advice: Advice) -> Failed:
    text = " ".join(f"HTTP {error.code} {error.reason}".split())
    error.close()
    if error.code in (401, 403):
        return Failed(Failure(f"{text}: {advice.no_access}", "lasting"), status=error.code)
    if error.code in (404, 410):
        text += f" at {without_login(error.url)}: {advice.elsewhere}, or {advice.by_hand}"
        return Failed(Failure(text, "lasting"), status=error.code)
    if error.code == 416:
        return Failed(Failure("the file on the server is shorter now; restarting", "refused for now"), status=416)
    if error.code in (408, 429) or error.code >= 500:
        return Failed(Failure(text, "refused for now"), _retry_after(error.headers.get("Retry-After")))
    return Failed(Failure(text, "lasting"))


def _retry_after(value: str | None) -> float:
    """Return the seconds of a `Retry-After` header, which gives seconds or a date."""
    if value is None:
        return 0.0
    if value.strip().isdigit():
        return float(value)
    with contextlib.suppress(ValueError, TypeError):
        return math.ceil(max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time()))
    return 0.0


@dataclass(frozen=True)
class _Note:
    """What the server said about a partial file; stored beside it for the next process."""

    url: str
    length: int | None = None
    etag: str | None = None
    modified: str | None = None

    @property
    def condition(self) -> str | None:
        """The value of `If-Range`. HTTP does not allow weak entity tags there."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.modified


def partial_path(target: Path) -> Path:
    """Return the path of the partial file, which is renamed to `target` when it is complete and verified."""
    return target.with_name(f"{target.name}.partial")


def fetch_small(url: str, advice: Advice, retries: Retries) -> bytes | None:
    """Return a file of at most 1 MiB; None if the server does not have it. Raises as `Retries.call` does."""

    def attempt() -> bytes | None:
        body = bytearray()
        try:
            for message in retries.messages(partial(get, url, {}, advice)):
                retries.answered()
                if isinstance(message, bytes):
                    body += message
                if len(body) > _SMALL or (isinstance(message, Answer) and message.is_page):
                    return None
        except Failed as error:
            if error.status in (403, 404, 410):
                return None
            raise
        return bytes(body)

    return retries.call(without_login(url), attempt)


def require_space(folder: Path, needed: int) -> None:
    """Raise `AsgoError` unless the disk of `folder` has `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise AsgoError(
            f"{folder}: {needed / 1e9:,.1f} GB are needed and {free / 1e9:,.1f} GB are free; "
            f"free {(needed - free) / 1e9:,.1f} GB more, or choose another folder"
        )


class Download:
    """Download `url` to `target`, by way of `target.partial`, whose bytes are never requested again.

    `run` raises `AsgoError` as `Retries.call` does, if the length (in bytes) or the MD5 is not the one given, and for
    a disk error. It raises `RunInterrupted` on a signal, and if `progress` raises it. The partial file is kept in all
    cases but a wrong MD5.
    """

    def __init__(
        self,
        url: str,
        target: Path,
        *,
        length: int | None,
        md5: str,
        advice: Advice,
        progress: Progress,
        retries: Retries,
    ) -> None:
        self._url = url
        self._place = without_login(url)
        self._target = target
        self._partial = partial_path(target)
        self._note_path = target.with_name(f"{self._partial.name}.json")
        self._expected = length
        self._md5 = md5
        self._advice = advice
        self._progress = progress
        self._retries = retries
        self._note = self._read_note()
        self._length = length or self._note.length
        self._digest = hashlib.md5(usedforsecurity=False)
        self._position = 0
        self._farthest = 0

    def run(self) -> None:
        """Download the file, verify it and rename it."""
        try:
            with open(self._partial, "ab", buffering=0, opener=refusing_links) as file:
                self._read_beginning()
                if self._length is None or self._position < self._length:
                    self._retries.call(self._target.name, partial(self._attempt, file))
            self._finish()
        except OSError as error:
            raise AsgoError(
                f"{error.filename or self._partial}: {error.strerror}; "
                "the partial file is kept: fix the problem, then run the same command again to resume"
            ) from None
        finally:
            self._remove_if_empty()

    def _read_beginning(self) -> None:
        """Compute the digest of the partial file."""
        size = self._partial.stat().st_size
        if self._length is not None and size > self._length:
            self._retries.notify(f"{self._partial.name}: longer than the whole {self._target.name}; restarting")
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
            for message in self._retries.messages(partial(get, self._url, self._range_headers(), self._advice)):
                if isinstance(message, Answer):
                    self._retries.answered()
                    self._accept(message)
                else:
                    self._append(file, message)
            self._require_end()
        except Failed as error:
            if error.status == 416:
                self._discard()
            raise

    def _require_end(self) -> None:
        if self._length is None:
            self._length = self._position
        if self._position < self._length:
            missing = self._length - self._position
            raise Failed(Failure(f"the connection ended {missing:,} bytes before the end", "unreachable"))

    def _range_headers(self) -> dict[str, str]:
        if self._position == 0:
            return {}
        # Two servers may use different tags for the same bytes, so only a tag of this server is a condition. The
        # digest at the end detects other bytes.
        condition = self._note.condition if self._note.url == self._place else None
        return {"Range": f"bytes={self._position}-"} | ({"If-Range": condition} if condition else {})

    def _accept(self, answer: Answer) -> None:
        """Check that the response is the rest of the file, or the whole file; then discard the partial file."""
        self._check_kind(answer)
        if answer.start == 0 and self._position > 0:
            why = "the server cannot resume a download" if self._is_noted(answer) else _CHANGED
            self._retries.notify(f"{self._target.name}: {why}; restarting")
            self._discard()
        elif answer.start != self._position:
            raise Failed(Failure("the server sent another range than requested", "refused for now"))
        elif self._position > 0 and self._has_changed(answer):
            self._discard()
            raise Failed(Failure(f"{_CHANGED}; restarting", "refused for now"))
        self._length = self._expected or answer.length
        require_space(self._target.parent, (self._length or 0) - self._position)
        note = _Note(self._place, answer.length, answer.etag, answer.modified)
        if note != self._note:
            write_atomically(self._note_path, json.dumps(vars(note)).encode())
            self._note = note

    def _check_kind(self, answer: Answer) -> None:
        expected = self._expected
        if answer.is_page:
            raise AsgoError(
                f"{self._place}: the server sent a web page instead of the file; it may require a login: "
                f"{self._advice.by_hand}"
            )
        if expected is not None and answer.length not in (None, expected):
            raise AsgoError(
                f"{self._place}: {answer.length:,} bytes long, but the right file has {expected:,}; "
                f"{self._advice.elsewhere}"
            )

    def _has_changed(self, answer: Answer) -> bool:
        """Whether the file on the server has changed; some servers ignore `If-Range`."""
        if self._length is not None and answer.length not in (None, self._length):
            return True
        is_same_place = self._note.url == self._place
        return is_same_place and self._note.condition is not None and not self._is_noted(answer)

    def _is_noted(self, answer: Answer) -> bool:
        noted = (self._note.url, self._note.etag, self._note.modified)
        return noted == (self._place, answer.etag, answer.modified)

    def _append(self, file: BinaryIO, piece: bytes) -> None:
        if self._length is not None and self._position + len(piece) > self._length:
            raise AsgoError(f"{self._place}: longer than {self._length:,} bytes; {self._advice.elsewhere}")
        rest = memoryview(piece)
        while rest:
            rest = rest[file.write(rest) :]
        self._digest.update(piece)
        self._position += len(piece)
        if self._position > self._farthest:
            self._farthest = self._position
            self._retries.advanced()
        self._progress(f"downloading {self._target.name}", self._position, self._length or self._position)

    def _discard(self) -> None:
        """Empty the partial file and remove its note; in this order, so a note never describes other bytes."""
        open(self._partial, "wb", opener=refusing_links).close()
        self._note_path.unlink(missing_ok=True)
        self._note = _Note(self._place)
        self._digest = hashlib.md5(usedforsecurity=False)
        self._position = 0
        self._length = self._expected

    def _finish(self) -> None:
        if self._digest.hexdigest() != self._md5:
            self._partial.unlink()
            self._note_path.unlink(missing_ok=True)
            raise AsgoError(
                f"{self._target.name}: the file from {self._place} has the MD5 {self._digest.hexdigest()}, not "
                f"{self._md5}, and was removed; run the same command again, or {self._advice.elsewhere}"
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
