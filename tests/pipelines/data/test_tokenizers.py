import lzma
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from pipelines.data import tokenizers
from pipelines.data.corpus.encode import _gigatoken_encode
from pipelines.data.tokenizers import BytesTokenizer, CharsTokenizer, Gpt2Tokenizer, Tokenizer, build_tokenizer
from pipelines.errors import AsgoError

HARD_TEXTS = [
    "hello world",
    "",
    "\x00 NUL, CRLF\r\n, tab\t, no-break\xa0space \u2028 line separator",
    "emoji 👩🏽‍🚀🇩🇪, CJK 漢字, combining e\u0301, 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 and \U0010ffff",
    "a literal <|endoftext|> in the text",
    "   \n\n\n   leading and trailing   ",
    "x" * 10_000,
]


def tokenizers_for(texts: list[str]) -> list[Tokenizer]:
    return [Gpt2Tokenizer(), BytesTokenizer(), CharsTokenizer("".join(sorted(set("".join(texts)))))]


@pytest.mark.parametrize("tokenizer", tokenizers_for(HARD_TEXTS), ids=lambda t: t.name)
@pytest.mark.parametrize("text", HARD_TEXTS, ids=lambda text: ascii(text[:12]))
def test_hard_text_survives_the_way_there_and_back(tokenizer: Tokenizer, text: str):
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.uint16
    assert tokens.ndim == 1
    assert tokenizer.decode(tokens) == text


@pytest.mark.parametrize("tokenizer", tokenizers_for(HARD_TEXTS), ids=lambda t: t.name)
def test_no_text_makes_the_end_of_text_token(tokenizer: Tokenizer):
    assert tokenizer.end_of_text == tokenizer.vocab_size - 1
    for text in HARD_TEXTS:
        assert tokenizer.end_of_text not in tokenizer.encode(text)


@pytest.mark.parametrize("tokenizer", tokenizers_for(HARD_TEXTS), ids=lambda t: t.name)
def test_a_batch_is_the_texts_one_by_one_in_order(tokenizer: Tokenizer):
    texts = HARD_TEXTS * 20
    for together, text in zip(tokenizer.encode_batch(texts), texts, strict=True):
        np.testing.assert_array_equal(together, tokenizer.encode(text))


@pytest.mark.parametrize("tokenizer", tokenizers_for(HARD_TEXTS), ids=lambda t: t.name)
def test_a_tokenizer_is_rebuilt_from_its_description(tokenizer: Tokenizer):
    rebuilt = build_tokenizer(tokenizer.describe())
    assert type(rebuilt) is type(tokenizer)
    assert (rebuilt.vocab_size, rebuilt.end_of_text) == (tokenizer.vocab_size, tokenizer.end_of_text)
    np.testing.assert_array_equal(rebuilt.encode(HARD_TEXTS[3]), tokenizer.encode(HARD_TEXTS[3]))


@pytest.mark.parametrize("tokenizer", tokenizers_for(HARD_TEXTS), ids=lambda t: t.name)
def test_end_of_text_is_shown_and_foreign_ids_are_refused(tokenizer: Tokenizer):
    assert tokenizer.decode([tokenizer.end_of_text, *tokenizer.encode("ok")]) == "<|endoftext|>ok"
    for token in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"token {token} is outside the vocabulary"):
            tokenizer.decode([token])


@pytest.mark.parametrize("tokenizer", tokenizers_for(["ab"]), ids=lambda t: t.name)
def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer):
    with pytest.raises(AsgoError, match=r"lone surrogate U\+D800 at character 1 "):
        tokenizer.encode("a\ud800b")


def test_gpt2_gives_the_published_tokens():
    gpt2 = Gpt2Tokenizer()
    assert (gpt2.vocab_size, gpt2.end_of_text) == (50_257, 50_256)
    assert gpt2.encode("hello world").tolist() == [31373, 995]
    assert gpt2.encode("<|endoftext|>").tolist() == [27, 91, 437, 1659, 5239, 91, 29]


def test_a_damaged_gpt2_table_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    table = bytearray(lzma.decompress(tokenizers._GPT2_TABLE.read_bytes()))
    table[1000] ^= 1
    (tmp_path / "table.xz").write_bytes(lzma.compress(bytes(table)))
    monkeypatch.setattr(tokenizers, "_GPT2_TABLE", tmp_path / "table.xz")
    with pytest.raises(AsgoError, match="damaged"):
        tokenizers.gpt2_encoding.__wrapped__()


def test_bytes_are_utf8_and_broken_ones_are_shown_as_such():
    tokenizer = BytesTokenizer()
    assert tokenizer.encode("é").tolist() == [0xC3, 0xA9]
    assert tokenizer.decode([0x61, 0xC3, 0x62]) == "a\ufffdb"


def test_chars_are_numbered_in_sorted_order():
    tokenizer = CharsTokenizer("abé😀")
    assert tokenizer.encode("😀éba").tolist() == [3, 2, 1, 0]
    assert tokenizer.vocab_size == 5


@pytest.mark.parametrize("foreign", ["z", "\x00", "\xea", "\u014c", "\U0010ffff"])
def test_chars_names_the_character_that_it_does_not_know(foreign: str):
    with pytest.raises(AsgoError, match=rf"U\+{ord(foreign):04X}, at 2\) is not among the 3 characters"):
        CharsTokenizer("abé").encode(f"ab{foreign}")


def test_an_alphabet_that_does_not_fit_in_16_bits_is_refused():
    letters = "".join(map(chr, range(0x10000, 0x10000 + 65_536)))
    assert CharsTokenizer(letters[1:]).encode(letters[-1]).tolist() == [65_534]
    with pytest.raises(AsgoError, match="65,536 different characters"):
        CharsTokenizer(letters)


@pytest.mark.parametrize(
    "description",
    [{}, {"name": "gpt3"}, {"name": "gpt2", "size": 3}, {"name": "chars"}, {"name": "chars", "alphabet": ["a"]}],
)
def test_a_wrong_description_is_refused(description: dict[str, object]):
    with pytest.raises(AsgoError, match=r"not a tokenizer: .*valid names are"):
        build_tokenizer(description)


@pytest.mark.parametrize("alphabet", ["ba", "aa"])
def test_an_unsorted_or_repeating_alphabet_is_refused(alphabet: str):
    with pytest.raises(AsgoError, match="sorted"):
        build_tokenizer({"name": "chars", "alphabet": alphabet})


def test_tokenizing_and_preparing_do_without_torch():
    code = (
        "import sys, pipelines.data.text_to_shards, pipelines.data.verify, pipelines.data.shakespeare\n"
        "from pipelines.data.tokenizers import Gpt2Tokenizer\n"
        "Gpt2Tokenizer().encode('a')\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


WORDS = ("a", "Zq", "'", "'s", "'ll", "'re", "1", "23", "½", "é", "ß", "字", "かな", "ー", "々")
BLANKS = (" ", "  ", "\n", "\t", "\x1c", "\x85", "\xa0", "\u3000")
SIGNS = ("、", "。", "！", "゛", "\u0301", ".", "..", "[", "`", "~", "|", "\\", "😀", "_")


def made_up(seed: int, signs: Sequence[str]) -> str:
    rng = np.random.default_rng(seed)
    return "".join(signs[index] for index in rng.integers(len(signs), size=rng.integers(1, 80)))


@pytest.mark.parametrize("seed", range(300))
def test_a_text_that_is_cut_keeps_its_tokens(seed: int):
    tokenizer, text = Gpt2Tokenizer(), made_up(seed, WORDS + BLANKS + SIGNS)
    tokens, rest = [], ""
    for start in range(0, len(text), 5):
        rest += text[start : start + 5]
        cut = tokenizer.last_cut(rest)
        tokens += tokenizer.encode(rest[:cut]).tolist()
        rest = rest[cut:]
    assert tokens + tokenizer.encode(rest).tolist() == tokenizer.encode(text).tolist()


@pytest.mark.parametrize("seed", range(100))
def test_long_blanks_may_be_split_off(seed: int):
    """As `encode` does with blanks of a million, where the library fails; here with those of two."""
    text = made_up(seed, WORDS + BLANKS * 5)
    split = re.compile(tokenizers._LONG_BLANK.pattern.replace("1000", "2"))
    parts = [Gpt2Tokenizer().encode(part) for part in split.split(text) if part]
    assert np.array_equal(np.concatenate(parts), Gpt2Tokenizer().encode(text))


@pytest.mark.parametrize("blank", [" ", "\n", "\t "])
def test_a_million_blanks_are_no_obstacle(blank: str):
    text = "Report" + blank * 1_000_001 + "total 42\n"
    tokens = Gpt2Tokenizer().encode(text)
    assert Gpt2Tokenizer().decode(tokens.tolist()) == text
    end = Gpt2Tokenizer().encode(f"{blank[-1]}total 42\n")
    assert np.array_equal(tokens[-len(end) :], end)
    pytest.importorskip("gigatoken")
    flat, _ = _gigatoken_encode()([text])
    assert np.array_equal(flat, tokens)
