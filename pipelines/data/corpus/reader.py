"""The process that reads a source and sends its batches through a pipe. Its parent may kill it at any time.

A process, not a thread: a library that hangs in a socket can only be ended with its process.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection

import pyarrow
import tqdm

from pipelines.data.addresses import without_secrets
from pipelines.data.child import begin_child
from pipelines.data.corpus.sources import (
    CorpusSource,
    OpenSource,
    Position,
    current_revision,
    holds_lines,
    open_source,
    read_file,
)
from pipelines.data.failure import Failure, failure_of

_FOLDERS_OF_URL = re.compile(r"https?://\S*/")
_ENVIRONMENT = {
    "USE_TORCH": "0",  # else datasets imports every framework that it finds: 3 s and 0.5 GB
    "USE_TF": "0",
    "USE_JAX": "0",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # send no statistics
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


@dataclass(frozen=True)
class TextBatch:
    """Rows of a file for a tokenizer; `column` is an Arrow stream of one column.

    With `are_lines`, the rows are lines of JSON with the text under `text_column`. `first_row` is the index in the file
    of the first row, from 0.
    """

    position: Position
    file: str
    first_row: int
    are_lines: bool
    column: bytes
    text_column: str = "text"


@dataclass(frozen=True)
class Ready:
    """The client library is imported: the network timeout starts now."""


@dataclass(frozen=True)
class Contact:
    """The network answered."""


@dataclass(frozen=True)
class Notice:
    """A warning of the client library about its connection."""

    text: str


@dataclass(frozen=True)
class End:
    """All files have been read."""


Message = OpenSource | Ready | Contact | TextBatch | Notice | Failure | End


def read_source(connection: Connection, source: CorpusSource, start: Position) -> None:
    """Main function of the process: send the status, each `TextBatch` from `start` on, and `End` or a `Failure`."""
    begin_child()
    os.environ.update(_ENVIRONMENT)
    # tqdm's default lock is shared between processes, and a killed process never releases it.
    tqdm.tqdm.set_lock(threading.RLock())
    try:
        for message in _messages(connection, source, start):
            connection.send(message)
    except BrokenPipeError:
        pass  # the parent has ended
    except Exception as error:
        if os.environ.get("ASGO_DEBUG") == "1":
            logging.getLogger(__name__).exception("reading failed")
        file = next(iter(getattr(error, "__notes__", ())), None)
        connection.send(failure_of(error, file=file, remote=source.folder is None))


def _messages(connection: Connection, source: CorpusSource, start: Position) -> Iterator[Message]:
    if source.folder is None:
        importlib.import_module("huggingface_hub.hf_api")
        _take_notices(connection)
        yield Ready()
        current_revision(source)
        yield Contact()
        _set_up_datasets()
    opened = open_source(source)
    yield opened
    for index, file in enumerate(opened.files[start.file :], start=start.file):
        try:
            place = start if index == start.file else Position(index, 0, 0)
            for rows in read_file(file, place, source.text_column):
                column = _serialize(rows.column)
                yield TextBatch(rows.position, file, rows.first, holds_lines(file), column, source.text_column)
        except Exception as error:
            error.add_note(file)
            raise
    yield End()


def _take_notices(connection: Connection) -> None:
    """Send the warnings of huggingface_hub, which retries five times and logs its pauses."""
    from huggingface_hub.utils import logging as hub_logging

    logger = hub_logging.get_logger()
    logger.handlers = [_Notices(connection)]
    logger.propagate = False


def _set_up_datasets() -> None:
    """Turn off the retries and log messages of datasets: huggingface_hub and `Feed` retry already."""
    import datasets

    datasets.disable_progress_bars()
    datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 1
    datasets.config.STREAMING_READ_RETRY_INTERVAL = datasets.config.STREAMING_OPEN_RETRY_INTERVAL = 0
    datasets.config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = 0
    datasets.config.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL = 0
    logger = datasets.logging.get_logger("datasets")
    logger.handlers = [logging.NullHandler()]
    logger.propagate = False


class _Notices(logging.Handler):
    """Sends the library's warnings, which announce its pauses, between the batches."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(logging.WARNING)
        self._connection = connection
        self._cause = ""

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())
        if "thrown while requesting" in text:
            # The next record announces the pause; without one, this was the last attempt.
            self._cause = f"{_FOLDERS_OF_URL.sub('', text)}; "
            return
        self._connection.send(Notice(without_secrets(self._cause + text)))
        self._cause = ""


def _serialize(column: pyarrow.Array) -> bytes:
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.table({"text": column})
    with pyarrow.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return bytes(sink.getvalue())
