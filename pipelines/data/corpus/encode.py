"""Encode batches of text rows as tokens. Runs in the tokenizer processes."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow
from numpy.typing import NDArray

from pipelines.data.corpus.reader import TextBatch
from pipelines.data.documents import in_pieces, pieces_of
from pipelines.data.manifest import DocumentCounts
from pipelines.data.tokenizers import END_OF_TEXT, Gpt2Tokenizer, Tokens, gpt2_table
from pipelines.errors import AsgoError
from pipelines.storage import parse_json

Backend = Literal["tiktoken", "gigatoken"]
Encode = Callable[[list[str]], tuple[NDArray[np.unsignedinteger[Any]], NDArray[np.int64]]]
"""Returns the concatenated tokens of the texts, (tokens,), and the number of each text's tokens, (texts,)."""

_TOKENS_PER_CACHE = 100_000_000


@dataclass(frozen=True)
class EncodedBatch:
    """The documents of a batch as tokens, (tokens,); each begins with end-of-text.

    `starts` (documents,) are the indices where documents begin. `documents` (documents,) are their numbers among all
    rows of the batch, including skipped ones; `counts` counts those.
    """

    tokens: Tokens
    starts: NDArray[np.int64]
    documents: NDArray[np.int64]
    counts: DocumentCounts


def best_backend() -> Backend:
    """Return gigatoken if it is installed: it is several times faster and returns the same tokens."""
    return "gigatoken" if importlib.util.find_spec("gigatoken") else "tiktoken"


class BatchEncoder:
    """Encodes with GPT-2's byte pairs. Compares gigatoken with tiktoken on one document per batch."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._encode: Encode = _tiktoken_encode
        self._room = 0  # tokens until gigatoken is rebuilt, because its cache grows without limit
        self._batches = 0

    def encode(self, batch: TextBatch) -> EncodedBatch:
        """Encode a batch. Raises `AsgoError` for a line that is not JSON, and if gigatoken and tiktoken disagree."""
        texts, numbers, counts = _plain_texts(_rows(batch))
        if not texts:
            return EncodedBatch(np.empty(0, np.uint16), np.empty(0, np.int64), np.empty(0, np.int64), counts)
        if self._backend == "gigatoken" and self._room <= 0:
            self._encode, self._room = _gigatoken_encode(), _TOKENS_PER_CACHE
        pieces, firsts = _in_pieces(texts, f"{batch.file}, at or after row {batch.first_row + 1}")
        flat, lengths = self._encode(pieces)
        self._room -= len(flat)
        starts = np.cumsum(lengths) - lengths
        if self._backend == "gigatoken":
            self._compare(pieces, flat, starts, lengths)
        starts = starts[firsts]
        return EncodedBatch(_with_end_of_text(flat, starts), starts + np.arange(len(starts)), numbers, counts)

    def _compare(
        self, texts: list[str], flat: NDArray[Any], starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> None:
        self._batches += 1
        chosen = self._batches * 7919 % len(texts)  # a prime, so every index of a batch is compared at some time
        got = flat[starts[chosen] : starts[chosen] + lengths[chosen]]
        if not np.array_equal(got, Gpt2Tokenizer().encode(texts[chosen])):
            raise AsgoError(
                f"gigatoken {version('gigatoken')} returns other tokens than tiktoken for a text that begins with "
                f"{texts[chosen][:40]!r}; uninstall it and start again with --overwrite"
            )


def _in_pieces(texts: list[str], where: str) -> tuple[list[str], list[int]]:
    """Return the texts, with long ones cut where that does not change the tokens, and each text's first piece."""
    last_cut = Gpt2Tokenizer().last_cut
    pieces: list[str] = []
    firsts = []
    for text in texts:
        firsts.append(len(pieces))
        pieces.extend(pieces_of(in_pieces(text, where, last_cut)))
    return pieces, firsts


def _rows(batch: TextBatch) -> Sequence[object]:
    column = pyarrow.ipc.open_stream(batch.column).read_all().column("text")
    if batch.are_lines:
        lines = ((batch.first_row + index + 1, line) for index, line in enumerate(column.to_pylist()))
        name = batch.text_column
        return [_text_of_line(line, name, f"{batch.file}, line {number}") for number, line in lines if line.strip()]
    try:
        rows: list[object] = column.to_pylist()
    except UnicodeDecodeError:
        rows = column.cast(pyarrow.large_binary()).to_pylist()
    return rows


def _text_of_line(line: bytes, column: str, where: str) -> object:
    try:
        row = parse_json(line)
    except ValueError as error:  # UnicodeDecodeError is a ValueError
        raise AsgoError(f"{where}: not valid JSON ({error}); correct it and start again with --overwrite") from None
    return row.get(column) if isinstance(row, dict) else None


def _plain_texts(rows: Sequence[object]) -> tuple[list[str], NDArray[np.int64], DocumentCounts]:
    """Return the texts to encode, their row numbers, and the counts of all rows."""
    texts, numbers = [], []
    empty = not_text = repaired = literal = 0
    for number, row in enumerate(rows):
        if not isinstance(row, (str, bytes)):
            not_text += 1
            continue
        text, was_valid = _repair(row)
        if not text or text.isspace():
            empty += 1
            continue
        repaired += not was_valid
        literal += END_OF_TEXT in text
        texts.append(text)
        numbers.append(number)
    counts = DocumentCounts(
        read=len(rows), empty=empty, not_text=not_text, repaired=repaired, literal_end_of_text=literal
    )
    return texts, np.array(numbers, dtype=np.int64), counts


def _repair(row: str | bytes) -> tuple[str, bool]:
    """Return the text with U+FFFD for each lone surrogate or invalid byte, and whether it was valid before.

    A pair of surrogates becomes the character that it encodes, as in `tiktoken.Encoding.encode`.
    """
    try:
        text = row.decode("utf-8", "surrogatepass") if isinstance(row, bytes) else row
    except UnicodeDecodeError:
        assert isinstance(row, bytes)
        return row.decode("utf-8", "replace"), False
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), False
    return text, True


def _tiktoken_encode(texts: list[str]) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    tokenizer = Gpt2Tokenizer()
    encoded = [tokenizer.encode(text) for text in texts]
    return np.concatenate(encoded), np.array([len(tokens) for tokens in encoded])


def _gigatoken_encode() -> Encode:
    from gigatoken import Tokenizer

    with tempfile.TemporaryDirectory(prefix="asgo-") as folder:
        table = Path(folder, "gpt2.tiktoken")
        table.write_bytes(gpt2_table())
        # With its default special tokens, it would encode a literal "<|endoftext|>" as end-of-text.
        tokenizer = Tokenizer.from_tiktoken(table, pretokenizer="gpt2", special_tokens={})

    def encode(texts: list[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        layout = tokenizer.encode_batch(texts, parallel=False).layout
        offsets = np.asarray(layout.offsets.data)
        return np.asarray(layout.content.data)[offsets[0] : offsets[-1]], np.diff(offsets)

    return encode


def _with_end_of_text(flat: NDArray[np.unsignedinteger[Any]], starts: NDArray[np.int64]) -> Tokens:
    """Return `flat` (tokens,) as uint16 with an end-of-text token inserted at each of `starts` (documents,)."""
    tokens = np.empty(len(flat) + len(starts), dtype=np.uint16)
    of_text = np.ones(len(tokens), dtype=bool)
    of_text[starts + np.arange(len(starts))] = False
    tokens[of_text] = flat
    tokens[~of_text] = Gpt2Tokenizer.end_of_text
    return tokens
