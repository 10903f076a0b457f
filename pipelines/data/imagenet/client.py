"""One request over HTTP(S), and what its failure means.

By the standard library's client: it needs nothing that another package may stop bringing along (huggingface_hub has
changed its own), asks for no compressed answers, and reads a body in pieces as large as the socket has them.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import http.client
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from pipelines.data.failure import Failure
from pipelines.data.retries import STALL_S, Failed, Send
from pipelines.errors import UsageError

ACCESS = "https://image-net.org/download-images.php"
BY_HAND = (
    f"ask for access at {ACCESS} and download the archives by hand: those that lie in --archives are used as they are"
)
_PIECE = 1 << 20
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


@dataclass(frozen=True)
class Answer:
    """What the server says before the body. `length` is that of the whole file, in bytes, where it is known."""

    start: int
    length: int | None
    etag: str | None
    modified: str | None
    is_page: bool


def check_url(url: str) -> str:
    """The base URL with a slash at its end. Raises `UsageError` for anything but http and https with a host."""
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address:
        raise UsageError(f"--base-url {url}: not an address that begins with http:// or https://")
    return url if url.endswith("/") else f"{url}/"


def without_login(url: str) -> str:
    """A URL as people and files may see it."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def get(url: str, headers: Mapping[str, str], send: Send[Answer | bytes]) -> None:
    """Send the `Answer` and then the body in pieces; it may end too early. Raises `Failed`."""
    request = urllib.request.Request(quote(without_login(url), safe="%/:=&?~#+!$,;'@()*[]"), headers=dict(headers))
    parts = urlsplit(url)
    if parts.username is not None:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
        # Not for the hosts that the server may send us on to.
        request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(login).decode()}")
    try:
        with urllib.request.urlopen(request, timeout=STALL_S) as response:
            send(_answer(response))
            left = response.length
            while piece := response.read1(_PIECE if left is None else min(_PIECE, left)):
                send(piece)
                left = None if left is None else left - len(piece)
    except (OSError, http.client.HTTPException) as error:
        raise _failed(error) from error
    except ValueError as error:  # what the library makes of some host names
        raise Failed(Failure(f"no usable address ({error})", "lasting")) from error


def _answer(response: http.client.HTTPResponse) -> Answer:
    start, length = 0, response.length
    if response.status == 206:
        match = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if match is None:
            raise http.client.HTTPException("a part came without saying which")
        start, length = int(match[1]), None if match[2] == "*" else int(match[2])
    return Answer(
        start=start,
        length=length,
        etag=response.headers.get("ETag"),
        modified=response.headers.get("Last-Modified"),
        is_page=response.headers.get_content_type() == "text/html",
    )


def _failed(error: Exception) -> Failed:
    if isinstance(error, urllib.error.HTTPError):
        return _refused(error)
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, ssl.SSLCertVerificationError):
        return Failed(Failure(f"the server's certificate is not trusted ({reason.verify_message})", "lasting"))
    if isinstance(reason, TimeoutError):
        return Failed(Failure(f"nothing came for {STALL_S:.0f} s", "unreachable"))
    text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
    return Failed(Failure(" ".join(text.split()), "unreachable"))


def _refused(error: urllib.error.HTTPError) -> Failed:
    text = " ".join(f"HTTP {error.code} {error.reason}".split())
    error.close()
    if error.code in (401, 403):
        return Failed(
            Failure(f"{text}: ImageNet is given to those who agree to its terms; {BY_HAND}", "lasting"),
            status=error.code,
        )
    if error.code in (404, 410):
        return Failed(
            Failure(f"{text} at {without_login(error.url)}: give another --base-url, or {BY_HAND}", "lasting"),
            status=error.code,
        )
    if error.code == 416:
        return Failed(Failure("the file on the server is shorter now; it begins again", "refused for now"), status=416)
    if error.code in (408, 429) or error.code >= 500:
        return Failed(Failure(text, "refused for now"), _retry_after(error.headers.get("Retry-After")))
    return Failed(Failure(text, "lasting"))


def _retry_after(value: str | None) -> float:
    """Seconds: the header gives them, or a date."""
    if value is None:
        return 0.0
    if value.strip().isdigit():
        return float(value)
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return 0.0
