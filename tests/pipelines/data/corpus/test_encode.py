import json
from collections.abc import Sequence

import numpy as np
import pyarrow
import pytest

from pipelines.data.corpus import encode
from pipelines.data.corpus.encode import Backend, BatchEncoder, EncodedBatch
from pipelines.data.corpus.reader import TextBatch
from pipelines.data.corpus.sources import Position
from pipelines.data.manifest import DocumentCounts
from pipelines.data.tokenizers import Gpt2Tokenizer
from pipelines.errors import AsgoError

BACKENDS = ("tiktoken", "gigatoken")
TEXTS = [
    "hello world",
    "",
    "Grüße, 世界 \U0001f600\n\n\tdef f(x): return x ** 2  # ünïcödé",
    " \n\t\u3000",
    "a<|endoftext|>b",
    "x" * 5000,
    "  leading and trailing  ",
]


def rows(values: Sequence[str | bytes | None]) -> TextBatch:
    """A batch of Parquet rows; bytes go into the column as they are, valid or not."""
    raw = [value.encode() if isinstance(value, str) else value for value in values]
    binary = pyarrow.array(raw, type=pyarrow.binary())
    column = pyarrow.StringArray.from_buffers(len(binary), *binary.buffers()[1:], binary.buffers()[0])
    return batch_of(column, are_lines=False)


def lines(values: Sequence[str]) -> TextBatch:
    return batch_of(pyarrow.array([value.encode() for value in values]), are_lines=True)


def batch_of(column: pyarrow.Array, *, are_lines: bool) -> TextBatch:
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.table({"text": column})
    with pyarrow.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return TextBatch(Position(0, 0, 3), "mirror/b.jsonl", 768, are_lines, bytes(sink.getvalue()))


def documents(encoded: EncodedBatch) -> dict[int, list[int]]:
    """Number to tokens, end-of-text taken off."""
    parts = np.split(encoded.tokens, encoded.starts[1:]) if len(encoded.starts) else []
    assert encoded.tokens.dtype == np.uint16
    assert all(part[0] == 50256 for part in parts)
    return {int(n): part[1:].tolist() for n, part in zip(encoded.documents, parts, strict=True)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["rows", "lines"])
def test_every_text_becomes_the_tokens_that_tiktoken_gives(backend: Backend, layout: str):
    batch = rows(TEXTS) if layout == "rows" else lines([json.dumps({"text": text, "id": 1}) for text in TEXTS])
    encoded = BatchEncoder(backend).encode(batch)
    tokenizer = Gpt2Tokenizer()
    expected = {n: tokenizer.encode(text).tolist() for n, text in enumerate(TEXTS) if text.strip()}
    assert documents(encoded) == expected
    assert 50256 not in expected[4]  # a literal <|endoftext|> is text
    assert encoded.counts == DocumentCounts(read=7, empty=2, literal_end_of_text=1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_are_not_valid_text_are_left_out_or_repaired_and_counted(backend: Backend):
    values = [None, b"caf\xe9", b"\xed\xa0\xbdhalf", b"\xed\xa0\xbd\xed\xb8\x80", "good", b"\xed\xa0\xbd\xff", "", None]
    encoded = BatchEncoder(backend).encode(rows(values))
    decoded = {n: Gpt2Tokenizer().decode(tokens) for n, tokens in documents(encoded).items()}
    replaced = "\ufffd"
    assert decoded == {
        1: f"caf{replaced}",
        2: f"{replaced}half",
        3: "\U0001f600",
        4: "good",
        5: decoded[5],  # more than one kind of damage: how many signs that makes is Python's affair
    }
    assert set(decoded[5]) == {replaced}
    assert encoded.counts == DocumentCounts(read=8, empty=1, not_text=2, repaired=4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lines_that_hold_no_text_are_counted_and_surrogates_fare_as_in_tiktoken(backend: Backend):
    values = [
        '{"text": "\\ud83d lone"}',
        '{"text": "\\ud83d\\ude00"}',
        '{"text": 7}',
        "[1]",
        "   ",
        '{"title": "x"}',
        '{"text": null}',
    ]
    encoded = BatchEncoder(backend).encode(lines(values))
    decoded = {n: Gpt2Tokenizer().decode(tokens) for n, tokens in documents(encoded).items()}
    assert decoded == {0: "\ufffd lone", 1: "\U0001f600"}
    assert encoded.counts == DocumentCounts(read=6, not_text=4, repaired=1)


def test_a_line_that_is_no_json_is_named_with_file_and_number():
    with pytest.raises(AsgoError, match=r"mirror/b\.jsonl, line 770: not valid JSON"):
        BatchEncoder("tiktoken").encode(lines(['{"text": "a"}', '{"text": "b']))


def test_utf8_in_a_line_must_be_valid():
    column = pyarrow.array([b'{"text": "caf\xe9"}'])
    with pytest.raises(AsgoError, match=r"line 769: not valid JSON .*invalid continuation byte"):
        BatchEncoder("tiktoken").encode(batch_of(column, are_lines=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_without_a_document_is_no_trouble(backend: Backend):
    encoded = BatchEncoder(backend).encode(rows([None, ""]))
    assert documents(encoded) == {}
    assert encoded.counts == DocumentCounts(read=2, empty=1, not_text=1)


def test_both_backends_agree_on_random_text():
    rng = np.random.default_rng(0)
    alphabet = np.array([*"abc ABC'’ 0129\n\t.,!?<|>éßж中文\u00a0\u200b\U0001f600"])
    texts = ["".join(rng.choice(alphabet, rng.integers(1, 200))) for _ in range(2000)]
    one, other = (BatchEncoder(backend).encode(rows(texts)) for backend in BACKENDS)
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_array_equal(one.starts, other.starts)


def test_a_gigatoken_that_gives_other_tokens_is_found_out(monkeypatch: pytest.MonkeyPatch):
    right = encode._gigatoken_encode()

    def wrong(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        flat, lengths = right(texts)
        return flat ^ 1, lengths

    monkeypatch.setattr(encode, "_gigatoken_encode", lambda: wrong)
    with pytest.raises(
        AsgoError, match=r"gigatoken .* returns other tokens than tiktoken for a text that begins with 'o"
    ):
        BatchEncoder("gigatoken").encode(rows(["one", "other", "only"]))


def test_every_place_in_a_batch_has_its_turn_in_the_comparison(monkeypatch: pytest.MonkeyPatch):
    compared = set()
    real = Gpt2Tokenizer.encode

    def noting(tokenizer: Gpt2Tokenizer, text: str) -> np.ndarray:
        compared.add(text)
        return real(tokenizer, text)

    monkeypatch.setattr(Gpt2Tokenizer, "encode", noting)
    encoder = BatchEncoder("gigatoken")
    texts = [f"text number {n}" for n in range(10)]
    for _ in range(10):
        encoder.encode(rows(texts))
    assert compared == set(texts)
