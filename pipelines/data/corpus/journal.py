"""`unfinished.json`: how far the preparation of a corpus has come, so that the next run goes on from there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, ValidationError

from pipelines.data.corpus.sources import Position
from pipelines.data.manifest import UNFINISHED, DocumentCounts, Frozen
from pipelines.data.shards import WriterState
from pipelines.errors import AsgoError
from pipelines.storage import write_atomically


class LastBatch(Frozen):
    """The last batch of the source that is written: which one, and the CRC-32 of its tokens."""

    file: NonNegativeInt
    group: NonNegativeInt
    batch: NonNegativeInt
    crc32: NonNegativeInt

    @property
    def position(self) -> Position:
        """Where it is."""
        return Position(self.file, self.group, self.batch)


class Journal(Frozen):
    """A consistent cut: the shards hold exactly the documents up to and with `last_batch`.

    `recipe` holds the options of the command, `revision` the state of the source that is being read.
    """

    format_version: Literal[1] = 1
    recipe: dict[str, str | int]
    revision: str
    last_batch: LastBatch | None = None
    documents: DocumentCounts = DocumentCounts()
    writers: Annotated[tuple[WriterState, ...], Field(strict=False)] = ()


def save_journal(folder: Path, journal: Journal) -> None:
    """Replace the journal of `folder` as a whole."""
    write_atomically(folder / UNFINISHED, journal.model_dump_json(indent=2).encode())


def load_journal(folder: Path) -> Journal | None:
    """The journal of `folder`, if it has one. Raises `AsgoError` when it cannot be read."""
    path = folder / UNFINISHED
    try:
        return Journal.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError:
        raise AsgoError(f"{path}: damaged; pass --overwrite to start again") from None
