"""Where the large corpora lie, and which of their files hold the text that was asked for."""

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

    Without `validate_every` the first shard of the stream validates; with it, the documents do whose number it divides,
    counting from 0.
    """

    name: str
    repository: str
    subset: str | None
    validate_every: int | None


FINEWEB = Corpus("fineweb", "HuggingFaceFW/fineweb-edu", subset="sample-10BT", validate_every=None)
OPENWEBTEXT = Corpus("openwebtext", "Skylion007/openwebtext", subset=None, validate_every=2000)
"""ASGO's experiments validate on a fraction of 0.0005 of the documents: one in 2,000."""


@dataclass(frozen=True)
class CorpusSource:
    """What to read: a repository of the hub at a revision (None: its newest), or a local folder of the same files."""

    corpus: Corpus
    folder: Path | None
    subset: str | None
    revision: str | None
    text_column: str = "text"

    @property
    def name(self) -> str:
        """For people, and for the manifest."""
        parts = [str(self.folder or self.corpus.repository), self.subset or ""]
        return ", ".join(filter(None, parts))


def build_source(corpus: Corpus, source: str, subset: str | None, text_column: str) -> CorpusSource:
    """The source that the options `--source`, `--subset` and `--text-column` name.

    Raises `UsageError` for a folder that is not there, and for a subset of a folder that has none.
    """
    if source == HUB:
        return CorpusSource(corpus, None, subset or corpus.subset, None, text_column)
    folder = Path(source).resolve()
    if not folder.is_dir():
        raise UsageError(f'--source {source}: no such folder; give "{HUB}" or a folder of .parquet or .jsonl files')
    if _lists_subsets(folder):
        return CorpusSource(corpus, folder, subset or corpus.subset, None, text_column)
    if subset is not None:
        raise UsageError(
            f"--subset {subset}: {folder} is a plain folder of files; leave --subset out, "
            "or copy the repository's README.md, which lists the subsets, into it"
        )
    return CorpusSource(corpus, folder, None, None, text_column)


def _lists_subsets(folder: Path) -> bool:
    """Whether this is a copy of a repository of the hub, with the page that says which files belong to which subset."""
    page = folder / "README.md"
    return page.exists() and b"config_name:" in page.read_bytes()


@dataclass(frozen=True)
class OpenSource:
    """The files of a source, in order, and which state of them this is."""

    revision: str
    files: tuple[str, ...]


def current_revision(source: CorpusSource) -> str:
    """The commit of the hub's repository. Raises whatever the client raises; the first contact with the network."""
    from huggingface_hub import HfApi

    info = HfApi().dataset_info(source.corpus.repository, revision=source.revision, timeout=_CONTACT_TIMEOUT_S)
    return str(info.sha)


def open_source(source: CorpusSource) -> OpenSource:
    """Find the files. Raises `UsageError` for an unknown subset and a folder without files."""
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
        # When the hub fails, datasets takes what it once stored of a dataset, and that has no list of files.
        with tempfile.TemporaryDirectory(prefix="asgo-") as no_cache:
            builder = load_dataset_builder(location, name=subset, revision=revision, cache_dir=no_cache)
    except ValueError as error:
        if "BuilderConfig" not in str(error):
            raise
        raise UsageError(f"no subset {subset}; {_after('Available:', str(error))}") from None
    files = [str(file) for file in (builder.config.data_files or {}).get("train", [])]
    if revision is None:
        _require_inside(Path(location), files)
    return _require_some(sorted(file for file in files if file.lower().endswith(_SUFFIXES)))


def _require_inside(folder: Path, files: Iterable[str]) -> None:
    """The page of a local copy says which files to read, and whoever wrote it may be a stranger."""
    for file in files:
        if not Path(os.path.abspath(file)).is_relative_to(folder):  # noqa: PTH100  (links may lead out; the user made them)
            raise UsageError(f"README.md there names {file}, which is not in the folder; take that line out of it")


def _require_some(files: Iterable[str]) -> tuple[str, ...]:
    found = tuple(files)
    if not found:
        raise UsageError("there is no file that ends in .parquet, .jsonl, .jsonl.gz, .json.gz or the like")
    return found


def _after(mark: str, message: str) -> str:
    return "there are" + message.split(mark, 1)[1] if mark in message else " ".join(message.split())


def _digest_of_listing(folder: Path, files: Sequence[str]) -> str:
    """Names and sizes: to read gigabytes only to see whether they have changed would take too long."""
    listing = [(Path(file).relative_to(folder).as_posix(), Path(file).stat().st_size) for file in files]
    return "files:" + hashlib.sha256(json.dumps(listing).encode()).hexdigest()


class Position(NamedTuple):
    """A batch in a source: the file, its row group (0 in files of lines), and the batch in that."""

    file: int
    group: int
    batch: int


@dataclass(frozen=True)
class Rows:
    """Some of the text column, or of the lines of a JSON lines file: (rows,), the first of them number `first`."""

    position: Position
    first: int
    column: pyarrow.Array


def holds_lines(file: str) -> bool:
    """Whether a file is one of JSON lines, and not Parquet."""
    return file.lower().endswith(_LINE_SUFFIXES)


def read_file(file: str, start: Position, column: str) -> Iterator[Rows]:
    """The rows of a file, `ROWS_IN_BATCH` and 32 MB at once at most (or one row), from the batch `start` of it on.

    `file` is a path or an hf:// address, opened as `datasets` opens what it streams. Of Parquet only `column` is read,
    from the row group of `start` on and a few megabytes at a time, whatever the size of the groups: the library's own
    way to go on inside a file is to read that again from its beginning. Raises `UsageError` when there is no such
    column of strings, and `AsgoError` for a line or row that is too long.
    """
    from datasets.utils.file_utils import xopen

    with xopen(file, "rb") as opened:
        yield from _read_lines(file, opened, start) if holds_lines(file) else _read_parquet(file, opened, start, column)


def _read_parquet(file: str, opened: BinaryIO, start: Position, column: str) -> Iterator[Rows]:
    is_local = Path(file).exists()
    try:
        for part in read_column(opened, column, first_group=start.group, only_strings=True, look_ahead=is_local):
            position = Position(start.file, part.group, part.number)
            if part.rows.nbytes > MAX_ROW_BYTES:  # it is a single row
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
