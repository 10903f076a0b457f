"""Where the large corpora lie, and which of their files hold the text that was asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipelines.data.documents import walk_files
from pipelines.errors import UsageError

if TYPE_CHECKING:
    import pyarrow

HUB = "hub"
ROWS_IN_BATCH = 256
_LINE_SUFFIXES = (".jsonl", ".jsonl.gz")
_SUFFIXES = (".parquet", *_LINE_SUFFIXES)
_CONTACT_TIMEOUT_S = 5
_READ_BYTES = 8 << 20


@dataclass(frozen=True)
class Corpus:
    """A text collection of the Hugging Face hub.

    Without `validate_every` the first shard of the stream validates; with it, every so manieth document, beginning
    with the first.
    """

    name: str
    repository: str
    subset: str | None
    validate_every: int | None


FINEWEB = Corpus("fineweb", "HuggingFaceFW/fineweb-edu", subset="sample-10BT", validate_every=None)
OPENWEBTEXT = Corpus("openwebtext", "Skylion007/openwebtext", subset=None, validate_every=2000)
"""ASGO's experiments validate on a fraction of 0.0005 of the documents: one in 2,000."""


@dataclass(frozen=True)
class Source:
    """What to read: a repository of the hub at a revision (None: its newest), or a local folder of the same files."""

    corpus: Corpus
    folder: Path | None
    subset: str | None
    revision: str | None

    @property
    def name(self) -> str:
        """For people, and for the manifest."""
        parts = [str(self.folder or self.corpus.repository), self.subset or ""]
        return ", ".join(filter(None, parts))


def build_source(corpus: Corpus, source: str, subset: str | None) -> Source:
    """The source that the options `--source` and `--subset` name.

    Raises `UsageError` for a folder that is not there, and for a subset of a folder that has none.
    """
    if source == HUB:
        return Source(corpus, None, subset or corpus.subset, None)
    folder = Path(source).resolve()
    if not folder.is_dir():
        raise UsageError(f'--source {source}: no such folder; give "{HUB}" or a folder of .parquet or .jsonl files')
    if (folder / "README.md").exists():
        return Source(corpus, folder, subset or corpus.subset, None)
    if subset is not None:
        raise UsageError(
            f"--subset {subset}: {folder} is a plain folder of files; leave --subset out, "
            "or copy the repository's README.md, which lists the subsets, into it"
        )
    return Source(corpus, folder, None, None)


@dataclass(frozen=True)
class OpenSource:
    """The files of a source, in order, and which state of them this is."""

    revision: str
    files: tuple[str, ...]


def current_revision(source: Source) -> str:
    """The commit of the hub's repository. Raises whatever the client raises; the first contact with the network."""
    from huggingface_hub import HfApi

    info = HfApi().dataset_info(source.corpus.repository, revision=source.revision, timeout=_CONTACT_TIMEOUT_S)
    return str(info.sha)


def open_source(source: Source) -> OpenSource:
    """Find the files. Raises `UsageError` for an unknown subset and a folder without files."""
    if source.folder is None:
        revision = source.revision or current_revision(source)
        return OpenSource(revision, tuple(_files_of_subset(source.corpus.repository, source.subset, revision)))
    if source.subset is not None or (source.folder / "README.md").exists():
        files = _files_of_subset(str(source.folder), source.subset, None)
    else:
        files = [str(path) for path in walk_files(source.folder, _SUFFIXES)]
    if not files:
        raise UsageError(f"{source.folder}: no file in this folder ends in {', '.join(_SUFFIXES)}")
    return OpenSource(_digest_of_listing(source.folder, files), tuple(files))


def _files_of_subset(location: str, subset: str | None, revision: str | None) -> list[str]:
    from datasets import load_dataset_builder

    try:
        builder = load_dataset_builder(location, name=subset, revision=revision)
    except ValueError as error:
        if "BuilderConfig" not in str(error):
            raise
        raise UsageError(f"{location}: no subset {subset}; {_after('Available:', str(error))}") from None
    files = (builder.config.data_files or {}).get("train", [])
    return sorted(str(file) for file in files if str(file).lower().endswith(_SUFFIXES))


def _after(mark: str, message: str) -> str:
    return "there are" + message.split(mark, 1)[1] if mark in message else " ".join(message.split())


def _digest_of_listing(folder: Path, files: list[str]) -> str:
    """Names and sizes: to read gigabytes only to see whether they have changed would take too long."""
    listing = [(Path(file).relative_to(folder).as_posix(), Path(file).stat().st_size) for file in files]
    return "files:" + hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def layout_of(file: str) -> Literal["rows", "lines"]:
    """Whether the batches of a file are rows of text, or lines of JSON that hold it."""
    return "lines" if file.lower().endswith(_LINE_SUFFIXES) else "rows"


def read_batches(file: str) -> Iterator[pyarrow.ChunkedArray]:
    """The column "text" of a Parquet file, or the lines of a JSON lines file: `ROWS_IN_BATCH` at once, then the rest.

    `file` is a path or an hf:// address. Only that column is read, a few megabytes at a time, whatever the size of
    the file's row groups. Raises `UsageError` when there is no such column of strings.
    """
    from datasets import load_dataset

    keywords: dict[str, object]
    if layout_of(file) == "lines":
        keywords = {"path": "text"}
    else:
        keywords = {"path": "parquet", "columns": ["text"], **_parquet_options()}
    stream = load_dataset(data_files={"train": [file]}, split="train", streaming=True, **keywords)
    _require_text(file, stream.features)
    for table in stream.with_format("arrow").iter(batch_size=ROWS_IN_BATCH):
        yield table.column("text")


def _parquet_options() -> dict[str, object]:
    from pyarrow.dataset import ParquetFragmentScanOptions

    options = ParquetFragmentScanOptions(use_buffered_stream=True, buffer_size=_READ_BYTES, pre_buffer=False)
    return {"batch_size": ROWS_IN_BATCH, "fragment_scan_options": options}


def _require_text(file: str, features: object) -> None:
    from datasets import Features, Value

    if features is None:  # lines of text, not looked at yet
        return
    assert isinstance(features, Features)
    kind = features.get("text")
    if not isinstance(kind, Value) or kind.dtype not in ("string", "large_string", "string_view"):
        raise UsageError(f'{file}: no column "text" that holds strings')
