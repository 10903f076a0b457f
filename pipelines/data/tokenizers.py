"""Tokenizers: GPT-2's byte pairs, plain bytes, and the characters of one text."""

from __future__ import annotations

import base64
import functools
import hashlib
import lzma
import os
import re
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import AsgoError

if TYPE_CHECKING:
    import tiktoken

Tokens = NDArray[np.uint16]
TokenizerName = Literal["gpt2", "bytes", "chars"]

END_OF_TEXT = "<|endoftext|>"
# GPT-2's tokenizer first splits text into whitespace, letters, numbers and the rest; a single blank belongs to what
# follows it. `_CUT` matches only where such a piece ends in any text. Its letters are letters in every version of
# Unicode, because tiktoken's version may differ from Python's. `_LONG_BLANK` ends before the last blank of a run, where
# GPT-2's tokenizer splits too.
_BLANK = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_CUT = re.compile(
    rf"(?<=[^{_BLANK}])(?=[{_BLANK}])"
    r"|(?<=[A-Za-z])(?=[!-@\[-`{-~])"
    r"|(?<=[\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3])(?=[\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f])"
)
_LONG_BLANK = re.compile(rf"((?<![{_BLANK}])[{_BLANK}]{{1000,}})(?=[{_BLANK}][^{_BLANK}])")
_GPT2_TABLE = Path(__file__).with_name("gpt2.tiktoken.xz")
_GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"


class Tokenizer(ABC):
    """Encodes text as token ids below `vocab_size`; a document starts with the id `end_of_text`.

    Encoding never adds or recognizes special tokens: a literal "<|endoftext|>" is ordinary text.
    """

    name: str
    vocab_size: int
    end_of_text: int

    @abstractmethod
    def encode(self, text: str) -> Tokens:
        """Return the token ids of `text`, shape (tokens,). Raises `AsgoError` for text that cannot be encoded."""

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """Return the token ids of each text, in the same order."""
        return [self.encode(text) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of `tokens`. Invalid UTF-8 becomes U+FFFD, end-of-text becomes "<|endoftext|>".

        Raises `ValueError` for an id outside the vocabulary.
        """
        ids = [int(token) for token in tokens]
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token {token} is outside the vocabulary of {self.vocab_size}")
        return self._decode(ids)

    def last_cut(self, text: str) -> int:
        """Return the last index where every text that starts with `text` can be cut without other tokens; 0 if none."""
        return len(text)

    @abstractmethod
    def _decode(self, tokens: list[int]) -> str: ...

    def describe(self) -> dict[str, str]:
        """Return the argument of `build_tokenizer` for the same tokenizer; plain JSON."""
        return {"name": self.name}


class Gpt2Tokenizer(Tokenizer):
    """The byte pairs of GPT-2, from a table in this package; needs no network."""

    name = "gpt2"
    vocab_size = 50_257
    end_of_text = 50_256

    def encode(self, text: str) -> Tokens:
        try:
            return gpt2_encoding().encode_to_numpy(text, disallowed_special=()).astype(np.uint16)
        except UnicodeEncodeError as error:
            raise _not_unicode(error) from None
        except ValueError:  # a stack overflow in tiktoken's regular expression, on very long whitespace
            parts = [part for part in _LONG_BLANK.split(text) if part]
            if len(parts) == 1:
                raise
            return np.concatenate([self.encode(part) for part in parts])

    def last_cut(self, text: str) -> int:
        for looked_at in (1 << 8, 1 << 16, len(text)):
            cuts = deque(_CUT.finditer(text, max(0, len(text) - looked_at)), maxlen=1)
            if cuts:
                return cuts[0].start()
        return 0

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        # The encoder is Rust code that releases the GIL: threads are enough, and need no copies.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(self.encode, texts))

    def _decode(self, tokens: list[int]) -> str:
        return gpt2_encoding().decode(tokens, errors="replace")


class BytesTokenizer(Tokenizer):
    """The bytes of the text in UTF-8."""

    name = "bytes"
    vocab_size = 257
    end_of_text = 256

    def encode(self, text: str) -> Tokens:
        return np.frombuffer(_encoded(text, "utf-8"), dtype=np.uint8).astype(np.uint16)

    def _decode(self, tokens: list[int]) -> str:
        raw = b"".join(_BYTE_SYMBOLS[token] for token in tokens)
        return raw.decode("utf-8", errors="replace")


_BYTE_SYMBOLS = [*(bytes([value]) for value in range(256)), END_OF_TEXT.encode()]


class CharsTokenizer(Tokenizer):
    """One token per character of `alphabet`, in the order of the code points."""

    name = "chars"

    def __init__(self, alphabet: str) -> None:
        if list(alphabet) != sorted(set(alphabet)):
            raise AsgoError("the alphabet of a chars tokenizer must be sorted and without duplicates")
        if len(alphabet) > np.iinfo(np.uint16).max:
            raise AsgoError(f"{len(alphabet):,} different characters do not fit in 16-bit tokens: use bytes or gpt2")
        self.alphabet = alphabet
        self.end_of_text = len(alphabet)
        self.vocab_size = len(alphabet) + 1
        self._ids = _id_by_code_point(alphabet)

    def encode(self, text: str) -> Tokens:
        codes = np.frombuffer(_encoded(text, "utf-32-le"), dtype="<u4")
        tokens: Tokens = self._ids[np.minimum(codes, len(self._ids) - 1)]
        unknown = np.flatnonzero(tokens == self.end_of_text)
        if len(unknown):
            place = int(unknown[0])
            raise AsgoError(
                f"character {text[place]!r} (U+{ord(text[place]):04X}, at {place:,}) is not among "
                f"the {len(self.alphabet)} characters of this tokenizer"
            )
        return tokens

    def _decode(self, tokens: list[int]) -> str:
        symbols = [*self.alphabet, END_OF_TEXT]
        return "".join(symbols[token] for token in tokens)

    def describe(self) -> dict[str, str]:
        return {"name": self.name, "alphabet": self.alphabet}


def build_tokenizer(description: Mapping[str, object]) -> Tokenizer:
    """Build a tokenizer from the result of `Tokenizer.describe`. Raises `AsgoError` for anything else."""
    match dict(description):
        case {"name": "gpt2", **rest} if not rest:
            return Gpt2Tokenizer()
        case {"name": "bytes", **rest} if not rest:
            return BytesTokenizer()
        case {"name": "chars", "alphabet": str(alphabet), **rest} if not rest:
            return CharsTokenizer(alphabet)
    shown = repr(dict(description))
    shown = shown if len(shown) <= 100 else f"{shown[:100]}..."
    raise AsgoError(f'not a tokenizer: {shown}; valid names are gpt2, bytes, and chars with its "alphabet"')


def _id_by_code_point(alphabet: str) -> Tokens:
    """Return the token id of every code point up to the largest plus one; end-of-text marks an unknown one."""
    codes = [ord(character) for character in alphabet]
    ids = np.full(max(codes, default=-1) + 2, len(alphabet), dtype=np.uint16)
    ids[codes] = np.arange(len(codes))
    return ids


def _encoded(text: str, encoding: str) -> bytes:
    try:
        return text.encode(encoding)
    except UnicodeEncodeError as error:
        raise _not_unicode(error) from None


def _not_unicode(error: UnicodeEncodeError) -> AsgoError:
    code = ord(error.object[error.start])
    return AsgoError(f"lone surrogate U+{code:04X} at character {error.start:,} is not valid Unicode text")


def gpt2_table() -> bytes:
    """Return GPT-2's symbols and ranks in tiktoken's text format. Raises `AsgoError` if the file is damaged."""
    table = lzma.decompress(_GPT2_TABLE.read_bytes())
    if hashlib.sha256(table).hexdigest() != _GPT2_SHA256:
        raise AsgoError(f"{_GPT2_TABLE}: the vocabulary is damaged; install asgo again")
    return table


@functools.cache
def gpt2_encoding() -> tiktoken.Encoding:
    """Return GPT-2's encoding. Built once per process: decompressing and indexing the table takes 0.2 s."""
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    ranks = {base64.b64decode(symbol): int(rank) for symbol, rank in map(bytes.split, gpt2_table().splitlines())}
    return tiktoken.Encoding(
        "gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: Gpt2Tokenizer.end_of_text},
        explicit_n_vocab=Gpt2Tokenizer.vocab_size,
    )
