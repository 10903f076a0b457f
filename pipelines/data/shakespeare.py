"""Prepare the tinyshakespeare text as characters."""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request
from pathlib import Path

from pipelines.data.addresses import without_secrets
from pipelines.data.destination import check_destination
from pipelines.data.documents import decode_utf8
from pipelines.data.manifest import Manifest
from pipelines.data.text_to_shards import Progress, TextSource, prepare_documents, prepare_text
from pipelines.errors import AsgoError

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
VAL_FRACTION = 0.1
_TIMEOUT_S = 15
_MOST_BYTES = 64 << 20


def prepare_shakespeare(
    text: str | None, out: Path, *, overwrite: bool = False, progress: Progress | None = None
) -> Manifest:
    """Prepare `text`, a file or an http(s) URL, as characters; the last tenth is the validation data, as in nanoGPT.

    Without `text`, downloads the tinyshakespeare file and checks its digest. Raises as `prepare_text` does, and
    `AsgoError` if the download fails.
    """
    if text is not None and not text.startswith(("http://", "https://")):
        return prepare_text(
            [Path(text)], out, tokenizer="chars", val_fraction=VAL_FRACTION, overwrite=overwrite, progress=progress
        )
    check_destination(out, overwrite=overwrite)
    url = text or URL
    raw = _download(url)
    if text is None and hashlib.sha256(raw).hexdigest() != SHA256:
        raise AsgoError(f"{url}: not the expected text (its SHA-256 differs); pass --input FILE with the text")
    shown = without_secrets(url)
    document = decode_utf8(raw, shown)
    return prepare_documents(
        TextSource(shown, lambda: [document]),
        out,
        tokenizer="chars",
        val_fraction=VAL_FRACTION,
        overwrite=overwrite,
        progress=progress,
    )


def _download(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response:
            content: bytes = response.read(_MOST_BYTES + 1)
            # `read` with a size does not raise `IncompleteRead` if the connection ends early.
            missing = int(response.headers.get("Content-Length", 0)) - len(content)
            if missing > 0 and len(content) <= _MOST_BYTES:
                raise http.client.IncompleteRead(content, missing)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        problem = without_secrets(f"could not download {url} ({reason})")
        raise AsgoError(f"{problem}; pass --input FILE with the text") from None
    if len(content) > _MOST_BYTES:
        raise AsgoError(f"{without_secrets(url)}: more than {_MOST_BYTES:,} bytes; download it and pass --input FILE")
    return content
