"""Convert documents to a folder of token shards, in two passes: check everything first, then write."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.data.destination import check_destination, held_destination, staged_data
from pipelines.data.documents import Document, find_files, pieces_of, read_documents
from pipelines.data.manifest import DocumentCounts, Manifest, SourcePosition, shard_name, write_manifest
from pipelines.data.permutation import frozen_permutation
from pipelines.data.shards import MAX_SHARD_TOKENS, ShardWriter
from pipelines.data.tokenizers import (
    END_OF_TEXT,
    BytesTokenizer,
    CharsTokenizer,
    Gpt2Tokenizer,
    Tokenizer,
    TokenizerName,
    Tokens,
)
from pipelines.errors import AsgoError, UsageError

Progress = Callable[[str, int, int | None], None]
"""Called as (phase, characters done, characters in total or None if not known yet)."""

Notify = Callable[[str], None]

_BATCH_CHARACTERS = 1 << 22


@dataclass(frozen=True)
class TextSource:
    """Text to prepare: `read` returns all documents, the same on every call; the manifest stores `name`."""

    name: str
    read: Callable[[], Iterable[Document]]


@dataclass(frozen=True)
class _Scan:
    lengths: NDArray[np.int64]  # characters of each document, shape (documents,)
    counts: DocumentCounts
    alphabet: str
    digest: str


class _Piece(NamedTuple):
    """Part of a document, on one side of the split; whether it begins and ends that side of the document."""

    text: str
    document: int
    validates: bool
    begins: bool
    ends: bool


def prepare_text(
    inputs: Sequence[Path],
    out: Path,
    *,
    tokenizer: TokenizerName,
    val_fraction: float,
    shard_tokens: int = 100_000_000,
    seed: int = 0,
    overwrite: bool = False,
    text_column: str = "text",
    progress: Progress | None = None,
    notify: Notify | None = None,
) -> Manifest:
    """Tokenize text files, JSON lines, Parquet files, or folders of them into the folder `out`.

    See `prepare_documents` for the options. Calls `notify` with the number of files read and skipped. Raises
    `UsageError` for missing inputs and if `out` is occupied, and `AsgoError` for text that cannot be read; writes
    nothing in either case.
    """
    check_destination(out, overwrite=overwrite)
    left_out: Counter[str] = Counter()
    files = find_files(inputs, text_column, left_out)
    if notify is not None:
        notify(_found(files, left_out))
    last_cut = Gpt2Tokenizer().last_cut if tokenizer == "gpt2" else len
    return prepare_documents(
        TextSource(_name(inputs), lambda: read_documents(files, text_column, last_cut)),
        out,
        tokenizer=tokenizer,
        val_fraction=val_fraction,
        shard_tokens=shard_tokens,
        seed=seed,
        overwrite=overwrite,
        progress=progress,
    )


def prepare_documents(
    source: TextSource,
    out: Path,
    *,
    tokenizer: TokenizerName,
    val_fraction: float,
    shard_tokens: int = 100_000_000,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Tokenize `source` into the folder `out`, which appears only when it is complete.

    Documents drawn at random (with `seed`) become validation data until they have exactly `val_fraction` of all
    characters, rounded up. The last one drawn is split: its tail is validation data, its head training data. Every
    piece starts with the end-of-text token. Training shards have `shard_tokens` tokens, the last one the rest. An
    existing `out` is replaced only with `overwrite`, and only if it holds token shards and nothing else. Raises
    `UsageError` while another process prepares the same folder.
    """
    _check_options(val_fraction, shard_tokens)
    report = progress or _silent
    with held_destination(out, overwrite=overwrite):
        scan = _scan(source, report, with_alphabet=tokenizer == "chars")
        heads = split_documents(scan.lengths, val_fraction, seed)
        encoder = _tokenizer(tokenizer, scan.alphabet)
        with staged_data(out, overwrite=overwrite) as folder:
            manifest = _write_shards(source, folder, encoder, scan, heads, shard_tokens, report)
            write_manifest(folder, manifest)
    return manifest


def split_documents(lengths: NDArray[np.int64], val_fraction: float, seed: int) -> NDArray[np.int64]:
    """Return the number of leading training characters of each document; the rest is validation. Shapes (documents,).

    Raises `AsgoError` if one of the two parts would be empty.
    """
    total = int(lengths.sum())
    # Exactly the decimal that the user typed: 0.1 is a tenth, not 0.1000000000000000055.
    validating = math.ceil(total * Fraction(repr(val_fraction)))
    if validating >= total:
        raise AsgoError(
            f"{total:,} characters of text are too few to split: a validation fraction of {val_fraction} takes "
            f"{validating:,} of them and leaves none for training; use more text"
        )
    order = frozen_permutation(len(lengths), seed)
    drawn = np.cumsum(lengths[order])
    last = int(np.searchsorted(drawn, validating))
    heads = lengths.copy()
    heads[order[:last]] = 0
    heads[order[last]] = drawn[last] - validating
    return heads


def _name(inputs: Sequence[Path]) -> str:
    shown = ", ".join(str(path) for path in inputs[:3])
    return shown if len(inputs) <= 3 else f"{shown} and {len(inputs) - 3:,} more"


def _check_options(val_fraction: float, shard_tokens: int) -> None:
    if not 0 < val_fraction < 1:
        raise UsageError(f"--val-fraction must lie between 0 and 1, not {val_fraction}")
    if not 1 <= shard_tokens <= MAX_SHARD_TOKENS:
        raise UsageError(f"--shard-tokens must lie between 1 and {MAX_SHARD_TOKENS:,}, not {shard_tokens:,}")


def _silent(phase: str, done: int, total: int | None) -> None:
    pass


def _tokenizer(name: TokenizerName, alphabet: str) -> Tokenizer:
    match name:
        case "gpt2":
            return Gpt2Tokenizer()
        case "bytes":
            return BytesTokenizer()
        case "chars":
            return CharsTokenizer(alphabet)


def _found(files: Sequence[Path], left_out: Counter[str]) -> str:
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in left_out.most_common() if count)
    return f"reading {len(files):,} file{'s' * (len(files) != 1)}{f'; skipped: {kinds}' if kinds else ''}"


def _scan(source: TextSource, progress: Progress, *, with_alphabet: bool) -> _Scan:
    """First pass: read everything, so errors of the input are raised before anything is written."""
    lengths = array("q")  # a list takes five times the memory, and there may be many documents
    alphabet: set[str] = set()
    digest = _Digest()
    done = reported = literals = 0
    for document in source.read():
        before, overlap, has_literal = done, "", False
        for text in pieces_of(document):
            digest.add(text)
            if with_alphabet:
                alphabet.update(text)
            has_literal |= END_OF_TEXT in overlap + text
            overlap = text[1 - len(END_OF_TEXT) :]
            done += len(text)
            if done - reported >= _BATCH_CHARACTERS:
                progress("reading", done, None)
                reported = done
        digest.end_document()
        lengths.append(done - before)
        literals += has_literal
    if not done:
        raise AsgoError(f"{source.name}: contains no text")
    counts = DocumentCounts(read=len(lengths), empty=lengths.count(0), literal_end_of_text=literals)
    return _Scan(np.array(lengths, dtype=np.int64), counts, "".join(sorted(alphabet)), digest.hexdigest())


class _Digest:
    """A digest of documents that does not depend on how they are cut into pieces."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._bytes = 0

    def add(self, text: str) -> None:
        content = text.encode()
        self._sha256.update(content)
        self._bytes += len(content)

    def end_document(self) -> None:
        self._sha256.update(self._bytes.to_bytes(8, "little"))  # moving a boundary must change the digest
        self._bytes = 0

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()


def _write_shards(
    source: TextSource,
    folder: Path,
    tokenizer: Tokenizer,
    scan: _Scan,
    heads: NDArray[np.int64],
    shard_tokens: int,
    progress: Progress,
) -> Manifest:
    """Second pass: encode and write the documents."""
    training_files = (folder / shard_name(index) for index in range(1, 1_000_000))
    total = int(scan.lengths.sum())
    done = 0
    progress("writing", done, total)
    with (
        ShardWriter([folder / shard_name(0)], shard_tokens=MAX_SHARD_TOKENS) as validation,
        ShardWriter(training_files, shard_tokens=shard_tokens) as training,
    ):
        sides = {True: _Side(validation, tokenizer.end_of_text), False: _Side(training, tokenizer.end_of_text)}
        for batch in _batches(_pieces(source, scan, heads)):
            encoded = tokenizer.encode_batch([piece.text for piece in batch])
            for piece, tokens in zip(batch, encoded, strict=True):
                sides[piece.validates].write(piece, tokens)
            done += sum(len(piece.text) for piece in batch)
            progress("writing", done, total)
        shards = [*validation.finish(), *training.finish()]
    # The manifest records where the next shard starts: after the validation shard, that is the first training document.
    first_trained = int(np.flatnonzero(heads)[0])
    shards[0] = shards[0].model_copy(update={"next_start": SourcePosition(document=first_trained, token=0)})
    return Manifest(
        source=source.name,
        revision=f"sha256:{scan.digest}",
        tokenizer=tokenizer.describe(),
        documents=scan.counts,
        shards=tuple(shards),
    )


class _Side:
    """One side of the split: its shards, and the number of tokens written of the current document."""

    def __init__(self, writer: ShardWriter, end_of_text: int) -> None:
        self._writer = writer
        self._start = np.array([end_of_text], dtype=np.uint16)
        self._written = 0

    def write(self, piece: _Piece, tokens: Tokens) -> None:
        if piece.begins:
            tokens, self._written = np.concatenate((self._start, tokens)), 0
        place = np.array([-self._written])
        taken = self._writer.write(tokens, place, np.array([piece.document]), complete=piece.ends)
        if taken < len(tokens):
            raise AsgoError(f"more than {MAX_SHARD_TOKENS:,} tokens do not fit in one validation shard")
        self._written += taken


def _pieces(source: TextSource, scan: _Scan, heads: NDArray[np.int64]) -> Iterator[_Piece]:
    """Yield the training and validation pieces of each document. Raises `AsgoError` if the source has changed."""
    digest = _Digest()
    for number, document in enumerate(source.read()):
        if number >= len(heads):
            raise _changed(source)
        head, length, place = int(heads[number]), int(scan.lengths[number]), 0
        for text in pieces_of(document):
            digest.add(text)
            cut, end = max(0, head - place), place + len(text)
            if text[:cut]:
                yield _Piece(text[:cut], number, validates=False, begins=not place, ends=end >= head)
            if text[cut:]:
                yield _Piece(text[cut:], number, validates=True, begins=place <= head, ends=end == length)
            place = end
        digest.end_document()
    if digest.hexdigest() != scan.digest:
        raise _changed(source)


def _changed(source: TextSource) -> AsgoError:
    return AsgoError(f"{source.name}: the text changed while it was being read; run again when it no longer changes")


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
