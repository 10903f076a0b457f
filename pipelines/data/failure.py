"""Classify read errors: retry or fail."""

from __future__ import annotations

import gzip
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import pyarrow

from pipelines.data.addresses import without_secrets
from pipelines.errors import AsgoError, UsageError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

_LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
_NO_CONTENT = (pyarrow.ArrowException, gzip.BadGzipFile, zlib.error, EOFError, ValueError)


@dataclass(frozen=True)
class Failure:
    """Why a read failed, and the file, if known.

    Kinds "usage" and "lasting": a retry would fail in the same way ("usage" needs other options). Kind "damaged": a
    retry may bring intact content. The others: the server or the network may recover.
    """

    text: str
    kind: Literal["usage", "lasting", "damaged", "unreachable", "refused for now"]
    file: str | None = None


def failure_of(error: Exception, *, file: str | None, remote: bool) -> Failure:
    """Classify an `error` raised while reading `file` from a remote or a local source."""
    if isinstance(error, UsageError):
        failure = Failure(str(error), "usage")
    else:
        failure = _remote_failure(error) if remote else _local_failure(error)
    return replace(failure, text=without_secrets(failure.text), file=file and without_secrets(file))


def _local_failure(error: Exception) -> Failure:
    if isinstance(error, AsgoError):
        return Failure(str(error), "lasting")
    text = _described(error)
    return Failure(f"damaged file ({text})" if isinstance(error, _NO_CONTENT) else text, "lasting")


def _remote_failure(error: Exception) -> Failure:
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, AsgoError):
        return Failure(str(error), "lasting")
    for cause in _causes(error):
        if isinstance(cause, OfflineModeIsEnabled):
            return Failure("HF_HUB_OFFLINE is set, so the hub is not used; unset it, or pass --source", "lasting")
        if isinstance(cause, HfHubHTTPError):
            return _answered(cause)
        if _is_unknown_dataset(cause):
            return Failure(f"{_first_line(cause)} If you have access, {_LOG_IN}", "lasting")
        if isinstance(cause, (ConnectionError, TimeoutError)) or _is_transport_error(cause):
            return Failure(_first_line(cause) or type(cause).__name__, "unreachable")
    if isinstance(error, FileNotFoundError):
        # While `datasets` lists the files, it raises this for any HTTP error.
        return Failure(_described(error), "refused for now")
    return Failure(_described(error), "damaged" if isinstance(error, (*_NO_CONTENT, OSError)) else "lasting")


def _is_unknown_dataset(error: BaseException) -> bool:
    """Whether this is datasets' `DatasetNotFoundError`. Does not import datasets, which takes seconds."""
    module = sys.modules.get("datasets.exceptions")
    return module is not None and isinstance(error, module.DatasetNotFoundError)


def _answered(error: HfHubHTTPError) -> Failure:
    status = error.response.status_code
    text = f"HTTP {status} {error.response.reason_phrase}"
    if error.server_message:
        text += f": {' '.join(error.server_message.split())}"
    if status == 416:  # the file is shorter than the listing says
        return Failure(text, "damaged")
    if status in (408, 429) or status >= 500:
        return Failure(text, "refused for now")
    return Failure(f"{text}; {_advice_on_access(error)}" if status in (401, 403) else text, "lasting")


def _advice_on_access(error: HfHubHTTPError) -> str:
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.errors import GatedRepoError

    if isinstance(error, GatedRepoError):
        return f"request access at {ENDPOINT}/datasets/{error.repo_id}, then {_LOG_IN}"
    return f"if you have access, {_LOG_IN}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Return the chain of causes, the root cause first: a network error says most."""
    found = []
    while error is not None:
        found.append(error)
        error = error.__cause__ or error.__context__
    return reversed(found)


def _is_transport_error(error: BaseException) -> bool:
    """By name, because the hub's client has changed its HTTP library from httpx to httpx2."""
    return any(base.__name__ == "TransportError" for base in type(error).__mro__)


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
