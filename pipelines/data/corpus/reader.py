"""The process that reads a source and sends its batches through a pipe; whoever started it may kill it at any time.

A process and not a thread, because a library that hangs in a socket can only be ended with its process.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Literal

import tqdm

from pipelines.data.corpus.sources import OpenSource, Source, current_revision, layout_of, open_source, read_batches
from pipelines.errors import AsgoError

if TYPE_CHECKING:
    import pyarrow


@dataclass(frozen=True, order=True)
class BatchPosition:
    """A batch in the source: the file's index, and the batch's index in that file."""

    file: int
    batch: int


@dataclass(frozen=True)
class Batch:
    """Up to `ROWS_IN_BATCH` rows: `column` is an Arrow stream of one column; `layout` says what the rows are."""

    position: BatchPosition
    file: str
    first_row: int
    layout: Literal["rows", "lines"]
    column: bytes


@dataclass(frozen=True)
class Contact:
    """The network answered."""


@dataclass(frozen=True)
class Skipped:
    """On the way to the first batch asked for."""

    position: BatchPosition


@dataclass(frozen=True)
class Notice:
    """What the client library has to say about its connection."""

    text: str


@dataclass(frozen=True)
class Failure:
    """Why reading ended. Only what is `lasting` would be the same if tried again; `damaged` content may come right."""

    text: str
    kind: Literal["lasting", "damaged", "unreachable", "refused for now"]


@dataclass(frozen=True)
class End:
    """All files were read."""


Message = OpenSource | Contact | Batch | Skipped | Notice | Failure | End


def read_source(connection: Connection, source: Source, start: BatchPosition) -> None:
    """The process's work: send `Contact`, `OpenSource`, each `Batch` from `start` on, and `End` or a `Failure`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # The lock that tqdm would make is shared between processes, and outlives one that is killed.
    tqdm.tqdm.set_lock(threading.RLock())
    try:
        for message in _messages(connection, source, start):
            connection.send(message)
    except BrokenPipeError:
        pass  # nobody listens any more
    except Exception as error:
        if os.environ.get("ASGO_DEBUG") == "1":
            logging.getLogger(__name__).exception("reading failed")
        connection.send(_failure(error, remote=source.folder is None))


def _messages(connection: Connection, source: Source, start: BatchPosition) -> Iterator[Message]:
    if source.folder is None:
        current_revision(source)
        yield Contact()
        _set_up_client(connection)
    opened = open_source(source)
    yield opened
    for index, file in enumerate(opened.files[start.file :], start=start.file):
        row = 0
        for number, column in enumerate(read_batches(file)):
            position = BatchPosition(index, number)
            if position < start:
                yield Skipped(position)
            else:
                yield Batch(position, file, row, layout_of(file), _serialize(column))
            row += len(column)
    yield End()


def _set_up_client(connection: Connection) -> None:
    """One try a layer: the library's own pauses cannot be seen, and take up to half an hour."""
    import datasets
    from huggingface_hub.utils import logging as hub_logging

    datasets.disable_progress_bars()
    datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 1
    datasets.config.STREAMING_READ_RETRY_INTERVAL = datasets.config.STREAMING_OPEN_RETRY_INTERVAL = 0
    for logger in (hub_logging.get_logger(), datasets.logging.get_logger("datasets")):
        logger.handlers = [_Notices(connection)]
        logger.propagate = False


class _Notices(logging.Handler):
    """Sends the library's warnings, which tell of its pauses, along with the batches."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(logging.WARNING)
        self._connection = connection

    def emit(self, record: logging.LogRecord) -> None:
        self._connection.send(Notice(" ".join(record.getMessage().split())))


def _serialize(column: pyarrow.ChunkedArray) -> bytes:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    table = pyarrow.table({"text": column})
    with pyarrow.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return bytes(sink.getvalue())


def _failure(error: Exception, *, remote: bool) -> Failure:
    """What an error means for whoever waits for the batches."""
    import pyarrow
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if isinstance(error, AsgoError):
        return Failure(str(error), "lasting")
    chain = list(_causes(error))
    if not remote:
        damaged = isinstance(error, (pyarrow.ArrowException, EOFError, zlib.error, UnicodeError, ValueError))
        return Failure(f"damaged file ({text})" if damaged else text, "lasting")
    for cause in chain:
        if isinstance(cause, OfflineModeIsEnabled):
            return Failure("HF_HUB_OFFLINE is set, and the hub cannot be asked", "lasting")
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            status = cause.response.status_code
            lasting = 400 <= status < 500 and status not in (408, 429)
            return Failure(f"HTTP {status}: {_first_line(cause)}", "lasting" if lasting else "refused for now")
        if isinstance(cause, (ConnectionError, TimeoutError)) or _is_transport_error(cause):
            return Failure(_first_line(cause) or type(cause).__name__, "unreachable")
    if isinstance(error, (pyarrow.ArrowException, EOFError, zlib.error, UnicodeError, ValueError, OSError)):
        return Failure(text, "damaged")
    return Failure(text, "lasting")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_transport_error(error: BaseException) -> bool:
    """By name, because the hub's client has changed its HTTP library from httpx to httpx2."""
    return any(base.__name__ == "TransportError" for base in type(error).__mro__)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
