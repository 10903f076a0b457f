"""Find and read the files of the large corpora, on the hub or in a local folder."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pyarrow

from pipelines.data.documents import walk_files
from pipelines.data.parquet_text import UnreadableColumn, read_column
from pipelines.data.unpacking import MAX_ROW_BYTES, PACKED_SUFFIXES, bounded_lines, too_long, unpack
from pipelines.errors import UsageError

HUB = "hub"
ROWS_IN_BATCH = 256
_LINES = (".jsonl", ".ndjson", ".json")
_LINE_SUFFIXES = (".jsonl", ".ndjson", *(plain + packed for plain in _LINES for packed in PACKED_SUFFIXES))
_SUFFIXES = (".parquet", *_LINE_SUFFIXES)
_CONTACT_TIMEOUT_S = 5
_BATCH_BYTES = 32 << 20


@dataclass(frozen=True)
class Corpus:
    """A text collection of the Hugging Face hub.

    Without `validate_every`, the first shard of the stream is the validation data; with it, every document whose number
    (from 0) is a multiple of it.
    """

    name: str
    repository: str
    subset: str | None
    validate_every: int | None


FINEWEB = Corpus("fineweb", "HuggingFaceFW/fineweb-edu", subset="sample-10BT", validate_every=None)
FINEWEB_NO_EDU = Corpus("fineweb-no-edu", "HuggingFaceFW/fineweb", subset="sample-10BT", validate_every=None)
OPENWEBTEXT = Corpus("openwebtext", "Skylion007/openwebtext", subset=None, validate_every=2000)
"""ASGO's experiments use a fraction of 0.0005 of the documents for validation: one in 2,000."""


@dataclass(frozen=True)
class CorpusSource:
    """A repository of the hub at a revision (None: the newest), or a local folder with the same files."""

    corpus: Corpus
    folder: Path | None
    subset: str | None
    revision: str | None
    text_column: str = "text"

    @property
    def name(self) -> str:
        """Name for messages and for the manifest."""
        parts = [str(self.folder or self.corpus.repository), self.subset or ""]
        return ", ".join(filter(None, parts))


def build_source(corpus: Corpus, source: str, subset: str | None, text_column: str) -> CorpusSource:
    """Return the source for the options `--source`, `--subset` and `--text-column`.

    Raises `UsageError` for a missing folder, and for a subset of a folder without subsets.
    """
    if source == HUB:
        return CorpusSource(corpus, None, subset or corpus.subset, None, text_column)
    folder = Path(source).resolve()
    if not folder.is_dir():
        raise UsageError(f'--source {source}: no such folder; pass "{HUB}" or a folder of .parquet or .jsonl files')
    if _lists_subsets(folder):
        return CorpusSource(corpus, folder, subset or corpus.subset, None, text_column)
    if subset is not None:
        raise UsageError(
            f"--subset {subset}: {folder} is a plain folder of files; omit --subset, "
            "or copy the repository's README.md, which lists the subsets, into the folder"
        )
    return CorpusSource(corpus, folder, None, None, text_column)


def _lists_subsets(folder: Path) -> bool:
    """Whether this is a copy of a hub repository, with the README.md that assigns files to subsets."""
    page = folder / "README.md"
    return page.exists() and b"config_name:" in page.read_bytes()


@dataclass(frozen=True)
class OpenSource:
    """The files of a source, in order, and their revision."""

    revision: str
    files: tuple[str, ...]


def current_revision(source: CorpusSource) -> str:
    """Return the commit of the hub's repository: the first network request. Raises what the client raises."""
    from huggingface_hub import HfApi

    info = HfApi().dataset_info(source.corpus.repository, revision=source.revision, timeout=_CONTACT_TIMEOUT_S)
    return str(info.sha)


def open_source(source: CorpusSource) -> OpenSource:
    """Find the files of a source. Raises `UsageError` for an unknown subset and for a folder without files."""
    if source.folder is None:
        revision = source.revision or current_revision(source)
        return OpenSource(revision, _files_of_subset(source.corpus.repository, source.subset, revision))
    if _lists_subsets(source.folder):
        files = _files_of_subset(str(source.folder), source.subset, None)
    else:
        files = _require_some(str(path) for path in walk_files(source.folder, _SUFFIXES))
    return OpenSource(_digest_of_listing(source.folder, files), files)


def _files_of_subset(location: str, subset: str | None, revision: str | None) -> tuple[str, ...]:
    from datasets import load_dataset_builder

    try:
        # If the hub fails, datasets falls back to its cache, which has no list of files: use an empty cache.
        with tempfile.TemporaryDirectory(prefix="asgo-") as no_cache:
            builder = load_dataset_builder(location, name=subset, revision=revision, cache_dir=no_cache)
    except ValueError as error:
        if "BuilderConfig" not in str(error):
            raise
        raise UsageError(f"no such subset: {subset}; {_after('Available:', str(error))}") from None
    files = [str(file) for file in (builder.config.data_files or {}).get("train", [])]
    if revision is None:
        _require_inside(Path(location), files)
    return _require_some(sorted(file for file in files if file.lower().endswith(_SUFFIXES)))


def _require_inside(folder: Path, files: Iterable[str]) -> None:
    """Raise `UsageError` for a file outside the folder: a local copy's README.md is not trusted."""
    for file in files:
        if not Path(os.path.abspath(file)).is_relative_to(folder):  # noqa: PTH100  (links may lead out; the user made them)
            raise UsageError(f"its README.md names {file}, which is not in the folder; remove that line")


def _require_some(files: Iterable[str]) -> tuple[str, ...]:
    found = tuple(files)
    if not found:
        raise UsageError(f"no file ends in one of {', '.join(_SUFFIXES)}")
    return found


def _after(mark: str, message: str) -> str:
    return "there are" + message.split(mark, 1)[1] if mark in message else " ".join(message.split())


def _digest_of_listing(folder: Path, files: Sequence[str]) -> str:
    """Return a digest of the names and sizes. A digest of the content would take too long."""
    listing = [(Path(file).relative_to(folder).as_posix(), Path(file).stat().st_size) for file in files]
    return "files:" + hashlib.sha256(json.dumps(listing).encode()).hexdigest()


class Position(NamedTuple):
    """Position of a batch in a source: the file, its row group (0 in files of lines), and the batch in the group."""

    file: int
    group: int
    batch: int


@dataclass(frozen=True)
class Rows:
    """Rows of the text column, or lines of a JSON lines file: (rows,). `first` is the index of the first row."""

    position: Position
    first: int
    column: pyarrow.Array


def holds_lines(file: str) -> bool:
    """Whether a file holds JSON lines, not Parquet."""
    return file.lower().endswith(_LINE_SUFFIXES)


def read_file(file: str, start: Position, column: str) -> Iterator[Rows]:
    """Yield the rows of a file from batch `start` on, at most `ROWS_IN_BATCH` rows and 32 MB (or one row) at a time.

    `file` is a path or an hf:// address, opened as `datasets` opens streams. Of Parquet, reads only `column`, from the
    row group of `start` on, a few megabytes at a time; `datasets` itself resumes by reading the file again from the
    start. Raises `UsageError` if there is no such column of strings, and `AsgoError` for a line or row that is too
    long.
    """
    from datasets.utils.file_utils import xopen

    with xopen(file, "rb") as opened:
        yield from _read_lines(file, opened, start) if holds_lines(file) else _read_parquet(file, opened, start, column)


def _read_parquet(file: str, opened: BinaryIO, start: Position, column: str) -> Iterator[Rows]:
    is_local = Path(file).exists()
    try:
        for part in read_column(opened, column, first_group=start.group, only_strings=True, look_ahead=is_local):
            position = Position(start.file, part.group, part.number)
            if part.rows.nbytes > MAX_ROW_BYTES:  # always a single row: `read_column` splits larger parts
                raise too_long(f"{file}, row {part.first + 1}")
            if position >= start:
                yield Rows(position, part.first, part.rows)
    except UnreadableColumn as error:
        raise UsageError(str(error)) from None


def _read_lines(file: str, opened: BinaryIO, start: Position) -> Iterator[Rows]:
    first = 0
    with unpack(opened, file) as stream:
        for number, lines in enumerate(_batches_of_lines(bounded_lines(stream, file))):
            if number >= start.batch:
                column = pyarrow.array(lines, type=pyarrow.large_binary())
                yield Rows(Position(start.file, 0, number), first, column)
            first += len(lines)


def _batches_of_lines(lines: Iterable[tuple[str, bytes]]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    size = 0
    for _, line in lines:
        if batch and size + len(line) > _BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(line)
        size += len(line)
        if len(batch) == ROWS_IN_BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
