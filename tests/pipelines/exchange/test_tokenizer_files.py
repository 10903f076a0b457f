"""Hugging Face's own tokenizers, made from the files that we write, give the ids of ours."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from pipelines.data.tokenizers import END_OF_TEXT, BytesTokenizer, CharsTokenizer, Gpt2Tokenizer, Tokenizer
from pipelines.exchange.tokenizer_files import tokenizer_files

ALPHABET = "".join(sorted(set("\n\r\t !abcdΩé中😀xyz<|>'\u0301")))
PIECES = [*map(chr, range(32, 127)), *"\n\r\t\0'", "  ", "'s", "'ll", " the", "123", "\u00a0", "\u3000", "\u200b", "é",
          "e\u0301", "ß", "Ω", "中文", "😀", "👩\u200d👩\u200d👧", "\ufeff", "\ufffd", "<|endoftext", "|>"]  # fmt: skip
OVER_UNICODE = [*range(32, 0xD800, 97), *range(0xE000, 0x110000, 9973)]


@pytest.fixture(scope="module", params=["gpt2", "bytes", "chars"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any, Path]:
    """Ours, theirs, and the folder of files between them."""
    ours = {"gpt2": Gpt2Tokenizer, "bytes": BytesTokenizer, "chars": lambda: CharsTokenizer(ALPHABET)}[request.param]()
    folder = tmp_path_factory.mktemp("tokenizer")
    for name, content in tokenizer_files(ours, context_length=10**6).items():
        (folder / name).write_text(content, encoding="utf-8")
    return ours, AutoTokenizer.from_pretrained(folder), folder


def some_texts(ours: Tokenizer) -> list[str]:
    """Hundreds of them, without a whole end-of-text symbol, in letters that the tokenizer knows."""
    draw = random.Random(0)
    if isinstance(ours, CharsTokenizer):
        return ["".join(draw.choices(ours.alphabet, k=draw.randrange(40))) for _ in range(300)]
    texts = ["".join(draw.choices(PIECES, k=draw.randrange(40))) for _ in range(300)]
    texts += ["".join(map(chr, draw.choices(OVER_UNICODE, k=20))) for _ in range(300)]
    return [text for text in texts if END_OF_TEXT not in text]


def test_the_ids_are_the_same_both_ways(pair: tuple[Tokenizer, Any, Path]) -> None:
    ours, theirs, _ = pair
    for text in some_texts(ours):
        ids = ours.encode(text).tolist()
        assert theirs(text)["input_ids"] == ids, repr(text)
        assert theirs.decode(ids) == text
    assert len(theirs) == ours.vocab_size


def test_the_end_of_text_is_special_there(pair: tuple[Tokenizer, Any, Path]) -> None:
    ours, theirs, _ = pair
    a, b = ours.encode("ab" if ours.name != "gpt2" else "a").tolist()[0], ours.encode("b").tolist()[0]
    assert theirs(f"a{END_OF_TEXT}b")["input_ids"] == [a, ours.end_of_text, b]
    assert (theirs.eos_token_id, theirs.bos_token_id) == (ours.end_of_text, ours.end_of_text)
    assert theirs.decode([a, ours.end_of_text, b], skip_special_tokens=True) == "ab"


def test_a_character_outside_of_the_alphabet_is_refused_there_too(pair: tuple[Tokenizer, Any, Path]) -> None:
    ours, theirs, _ = pair
    if ours.name == "chars":
        with pytest.raises(Exception, match="Missing"):
            theirs("aQ")


def test_the_merges_of_gpt2_are_the_published_ones(pair: tuple[Tokenizer, Any, Path]) -> None:
    """The hash is that of OpenAI's `vocab.bpe`, which tiktoken checks, too."""
    ours, _, folder = pair
    if ours.name == "gpt2":
        digest = hashlib.sha256((folder / "merges.txt").read_bytes()).hexdigest()
        assert digest == "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
