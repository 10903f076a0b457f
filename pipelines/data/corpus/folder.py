"""State of the folder that a corpus is prepared in: free, complete, or unfinished with a journal to resume from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, ValidationError

from pipelines.data.corpus.sources import Position
from pipelines.data.holding import foreign_names, require_same_options
from pipelines.data.manifest import MANIFEST, UNFINISHED, DocumentCounts, Frozen, Manifest, load_manifest
from pipelines.data.shards import WriterState
from pipelines.errors import AsgoError, UsageError
from pipelines.storage import write_atomically

Recipe = Mapping[str, str | int]


class LastBatch(Frozen):
    """Position of the last batch written, and the CRC-32 of its tokens."""

    file: NonNegativeInt
    group: NonNegativeInt
    batch: NonNegativeInt
    crc32: NonNegativeInt

    @property
    def position(self) -> Position:
        """The batch's position in the source."""
        return Position(self.file, self.group, self.batch)


class Journal(Frozen):
    """A consistent checkpoint: the shards hold exactly the documents up to and including `last_batch`.

    `recipe` holds the options of the command, `revision` the version of the source.
    """

    format_version: Literal[1] = 1
    recipe: dict[str, str | int]
    revision: str
    last_batch: LastBatch | None = None
    documents: DocumentCounts = DocumentCounts()
    writers: Annotated[tuple[WriterState, ...], Field(strict=False)] = ()


def save_journal(folder: Path, journal: Journal) -> None:
    """Replace the journal of `folder` atomically."""
    write_atomically(folder / UNFINISHED, journal.model_dump_json(indent=2).encode())


def load_journal(folder: Path) -> Journal | None:
    """Return the journal of `folder`, or None. Raises `AsgoError` if it is damaged."""
    path = folder / UNFINISHED
    try:
        return Journal.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError:
        raise AsgoError(f"{path}: damaged; pass --overwrite to start again") from None


def finished_manifest(folder: Path, recipe: Recipe) -> Manifest | None:
    """Return the manifest if `folder` is complete, or None. Raises `UsageError` if it was made with other options."""
    if not (folder / MANIFEST).exists():
        return None
    manifest = load_manifest(folder)
    require_same_options(folder, "complete", manifest.recipe, recipe, _difference)
    return manifest


def unfinished_journal(folder: Path, recipe: Recipe) -> Journal | None:
    """Return the journal if the work in `folder` can be resumed, or None if the folder is empty.

    Raises `UsageError` if it was started with other options, or the folder holds other files.
    """
    journal = load_journal(folder)
    if journal is not None:
        require_same_options(folder, "unfinished", journal.recipe, recipe, _difference)
    # A kill during the first write of the journal leaves only its partial file.
    elif any(path.name != f".{UNFINISHED}.partial" for path in folder.iterdir()):
        raise UsageError(f"{folder}: this folder is not empty; choose another --out, or pass --overwrite")
    return journal


def require_replaceable(folder: Path) -> None:
    """Raise `UsageError` if `folder` holds anything but shards, their manifest and their journal."""
    foreign = foreign_names(folder)
    if foreign:
        raise UsageError(
            f"{folder}: {foreign[0]} is not part of a corpus, so nothing is overwritten; choose another --out"
        )


def _difference(name: str, before: str | int | None, now: str | int | None) -> str:
    flag = name if name == "corpus" else f"--{name.replace('_', '-')}"
    return f"{flag} {_shown(before)} and not {_shown(now)}"


def _shown(value: str | int | None) -> str:
    return "none" if value is None else f"{value:,}" if isinstance(value, int) else value
