"""Documents into a folder of token shards, in two passes: look at everything first, then write."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.data.documents import find_files, read_documents
from pipelines.data.manifest import (
    MANIFEST,
    DocumentCounts,
    Manifest,
    SourcePosition,
    load_manifest,
    shard_name,
    write_manifest,
)
from pipelines.data.permutation import frozen_permutation
from pipelines.data.shards import MAX_SHARD_TOKENS, ShardWriter
from pipelines.data.tokenizers import (
    END_OF_TEXT,
    BytesTokenizer,
    CharsTokenizer,
    Gpt2Tokenizer,
    Tokenizer,
    TokenizerName,
)
from pipelines.errors import AsgoError, UsageError
from pipelines.storage import staged_folder

Progress = Callable[[str, int, int | None], None]
"""Called as (what is being done, characters done, characters in total or None if not known yet)."""

_BATCH_CHARACTERS = 1 << 22
_FIRST = np.zeros(1, dtype=np.int64)


@dataclass(frozen=True)
class Source:
    """Text to prepare: `read` gives every document, the same ones each time; `name` goes into the manifest."""

    name: str
    read: Callable[[], Iterable[str]]


@dataclass(frozen=True)
class _Scan:
    lengths: NDArray[np.int64]  # characters of each document, shape (documents,)
    counts: DocumentCounts
    alphabet: str
    digest: str


class _Piece(NamedTuple):
    text: str
    document: int
    validates: bool


def prepare_text(
    inputs: Sequence[Path],
    out: Path,
    *,
    tokenizer: TokenizerName,
    val_fraction: float,
    shard_tokens: int = 100_000_000,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Tokenize text files, JSON lines, Parquet files, or folders of them into the folder `out`.

    See `prepare_documents` for the options. Raises `UsageError` for inputs that are not there and a folder that is
    in the way, `AsgoError` for text that cannot be read; nothing is written in either case.
    """
    check_destination(out, overwrite=overwrite)
    files = find_files(inputs)
    return prepare_documents(
        Source(_name(inputs), lambda: read_documents(files)),
        out,
        tokenizer=tokenizer,
        val_fraction=val_fraction,
        shard_tokens=shard_tokens,
        seed=seed,
        overwrite=overwrite,
        progress=progress,
    )


def prepare_documents(
    source: Source,
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

    Documents drawn at random (by `seed`) validate until they hold exactly `val_fraction` of all characters, rounded
    up; the tail of the last one drawn validates and its head trains. Every piece starts with the end-of-text
    token. Training shards hold `shard_tokens` tokens, the last one what is left. An existing `out` is replaced
    only with `overwrite`, and only if it holds token shards and nothing else.
    """
    _check_options(val_fraction, shard_tokens)
    check_destination(out, overwrite=overwrite)
    report = progress or _silent
    scan = _scan(source, report, with_alphabet=tokenizer == "chars")
    heads = split_documents(scan.lengths, val_fraction, seed)
    encoder = _tokenizer(tokenizer, scan.alphabet)
    with staged_folder(out.resolve(), replace=overwrite) as folder:
        manifest = _write_shards(source, folder, encoder, scan, heads, shard_tokens, report)
        write_manifest(folder, manifest)
    return manifest


def check_destination(out: Path, *, overwrite: bool) -> None:
    """Raise `UsageError` unless a data folder may be made at `out`.

    Free is what does not exist or is an empty folder; with `overwrite` also a folder of token shards that holds
    nothing else, so that no other work is ever deleted.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"{out}: a file is in the way; choose another --out")
    names = sorted(path.name for path in out.iterdir())
    if not names:
        return
    if not overwrite:
        raise UsageError(f"{out}: this folder is not empty; choose another --out, or pass --overwrite")
    if MANIFEST not in names:
        raise UsageError(f"{out}: not a folder of token shards (no {MANIFEST}), so it is not overwritten")
    expected = {MANIFEST, *(shard.file for shard in load_manifest(out).shards)}
    others = [name for name in names if name not in expected]
    if others:
        raise UsageError(f"{out}: it also holds {others[0]}, so it is not overwritten; move that away first")


def split_documents(lengths: NDArray[np.int64], val_fraction: float, seed: int) -> NDArray[np.int64]:
    """How many leading characters of each document train; the others validate. Shapes (documents,).

    Raises `AsgoError` if one of the two parts would be empty.
    """
    total = int(lengths.sum())
    # The fraction as the decimal that was typed: 0.1 is a tenth, not 0.1000000000000000055.
    validating = math.ceil(total * Fraction(repr(val_fraction)))
    if validating >= total:
        raise AsgoError(
            f"{total:,} characters of text are too few to split: with a validation fraction of {val_fraction} "
            f"{validating:,} would validate and none train; give more text"
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


def _scan(source: Source, progress: Progress, *, with_alphabet: bool) -> _Scan:
    """The first pass: meets every error that the input can cause, before anything is written."""
    lengths: list[int] = []
    alphabet: set[str] = set()
    digest = hashlib.sha256()
    done = reported = literals = 0
    for text in source.read():
        lengths.append(len(text))
        literals += END_OF_TEXT in text
        _add(digest, text)
        if with_alphabet:
            alphabet.update(text)
        done += len(text)
        if done - reported >= _BATCH_CHARACTERS:
            progress("reading", done, None)
            reported = done
    if not done:
        raise AsgoError(f"{source.name}: there is no text in it")
    counts = DocumentCounts(read=len(lengths), empty=lengths.count(0), literal_end_of_text=literals)
    return _Scan(np.array(lengths, dtype=np.int64), counts, "".join(sorted(alphabet)), digest.hexdigest())


def _add(digest: hashlib._Hash, text: str) -> None:
    content = text.encode()
    digest.update(len(content).to_bytes(8, "little"))  # so that moving a boundary changes the digest
    digest.update(content)


def _write_shards(
    source: Source,
    folder: Path,
    tokenizer: Tokenizer,
    scan: _Scan,
    heads: NDArray[np.int64],
    shard_tokens: int,
    progress: Progress,
) -> Manifest:
    """The second pass: encode and write what the first one saw."""
    training_files = (folder / shard_name(index) for index in range(1, 1_000_000))
    start = np.array([tokenizer.end_of_text], dtype=np.uint16)
    total = int(scan.lengths.sum())
    done = 0
    progress("writing", done, total)
    with (
        ShardWriter([folder / shard_name(0)], shard_tokens=MAX_SHARD_TOKENS) as validation,
        ShardWriter(training_files, shard_tokens=shard_tokens) as training,
    ):
        for batch in _batches(_pieces(source, scan.digest, heads)):
            encoded = tokenizer.encode_batch([piece.text for piece in batch])
            for piece, tokens in zip(batch, encoded, strict=True):
                writer = validation if piece.validates else training
                whole = np.concatenate((start, tokens))
                if writer.write(whole, _FIRST, np.array([piece.document])) < len(whole):
                    raise AsgoError(f"more than {MAX_SHARD_TOKENS:,} tokens do not fit in one validation shard")
            done += sum(len(piece.text) for piece in batch)
            progress("writing", done, total)
        shards = [*validation.finish(), *training.finish()]
    first_trained = int(np.flatnonzero(heads)[0])
    shards[0] = shards[0].model_copy(update={"next_start": SourcePosition(document=first_trained, token=0)})
    return Manifest(
        source=source.name,
        revision=f"sha256:{scan.digest}",
        tokenizer=tokenizer.describe(),
        documents=scan.counts,
        shards=tuple(shards),
    )


def _pieces(source: Source, expected_digest: str, heads: NDArray[np.int64]) -> Iterator[_Piece]:
    """What trains and what validates of each document. Raises `AsgoError` if the source is no longer as scanned."""
    digest = hashlib.sha256()
    for document, text in enumerate(source.read()):
        if document >= len(heads):
            raise _changed(source)
        _add(digest, text)
        head = int(heads[document])
        if head:
            yield _Piece(text[:head], document, validates=False)
        if head < len(text):
            yield _Piece(text[head:], document, validates=True)
    if digest.hexdigest() != expected_digest:
        raise _changed(source)


def _changed(source: Source) -> AsgoError:
    return AsgoError(f"{source.name}: the text changed while it was being read; start again when it is at rest")


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
