"""Write our tokenizers as files for Hugging Face's `AutoTokenizer`, without its libraries.

They give the same ids, except for a literal "<|endoftext|>": the end-of-text symbol there, ordinary text here.
"""

from __future__ import annotations

import base64
import itertools
import json
from typing import Any

from pipelines.data.tokenizers import END_OF_TEXT, CharsTokenizer, Gpt2Tokenizer, Tokenizer, gpt2_table

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def tokenizer_files(tokenizer: Tokenizer, context_length: int) -> dict[str, str]:
    """Return the contents by file name."""
    end_of_text = dict.fromkeys(("bos_token", "eos_token"), END_OF_TEXT)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        **end_of_text,
    }
    if isinstance(tokenizer, CharsTokenizer):
        return {"tokenizer_config.json": _json(config), "tokenizer.json": _json(_of_characters(tokenizer))}
    if not isinstance(tokenizer, Gpt2Tokenizer):
        return {"tokenizer_config.json": _json(config), "tokenizer.json": _json(_of_bytes(tokenizer))}
    config |= {"tokenizer_class": "GPT2Tokenizer", "unk_token": END_OF_TEXT, "add_prefix_space": False}
    symbols = _gpt2_symbols()
    vocabulary = {_printable(symbol): rank for rank, symbol in enumerate(symbols)} | {END_OF_TEXT: len(symbols)}
    merges = [f"{_printable(left)} {_printable(right)}" for left, right in _merges_of(symbols)]
    return {
        "tokenizer_config.json": _json(config),
        "tokenizer.json": _json(_byte_pairs(vocabulary, merges)),
        "vocab.json": _json(vocabulary),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
    }


def _merges_of(symbols: list[bytes]) -> list[tuple[bytes, bytes]]:
    """Return the two parts of each symbol longer than a byte, in the order of `symbols`, which is the order of merges.

    To find the parts, merge a symbol's bytes with the earlier symbols only: two parts remain.
    """
    ranks = {symbol: rank for rank, symbol in enumerate(symbols)}
    merges = []
    for rank, symbol in enumerate(symbols):
        if len(symbol) > 1:
            left, right = _merged(symbol, ranks, rank)
            merges.append((left, right))
    return merges


def _merged(symbol: bytes, ranks: dict[bytes, int], limit: int) -> list[bytes]:
    """Return a symbol's bytes after all merges to symbols with a rank below `limit`."""
    parts = [symbol[i : i + 1] for i in range(len(symbol))]
    while True:
        found = [ranks.get(left + right, limit) for left, right in itertools.pairwise(parts)]
        lowest = min(found, default=limit)
        if lowest >= limit:
            return parts
        place = found.index(lowest)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


def _gpt2_symbols() -> list[bytes]:
    """Return GPT-2's symbols in the order of their ids, which is the order of the table."""
    return [base64.b64decode(line.split()[0]) for line in gpt2_table().splitlines()]


def _of_bytes(tokenizer: Tokenizer) -> dict[str, Any]:
    vocabulary = {_printable(bytes([value])): value for value in range(256)} | {END_OF_TEXT: tokenizer.end_of_text}
    return _byte_pairs(vocabulary, [])


def _byte_pairs(vocabulary: dict[str, int], merges: list[str]) -> dict[str, Any]:
    """Return a byte-pair `tokenizer.json` that merges only within GPT-2's words."""
    model = {"type": "BPE", "vocab": vocabulary, "merges": merges}
    return _tokenizer(_BYTE_LEVEL, _BYTE_LEVEL, model, vocabulary[END_OF_TEXT])


def _of_characters(tokenizer: CharsTokenizer) -> dict[str, Any]:
    """Return a `tokenizer.json` of one-character words. Other characters raise an error: there is no unknown token."""
    each = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
    vocabulary = {character: place for place, character in enumerate(tokenizer.alphabet)}
    model = {"type": "WordLevel", "vocab": {**vocabulary, END_OF_TEXT: tokenizer.end_of_text}, "unk_token": "[UNK]"}
    return _tokenizer(each, {"type": "Fuse"}, model, tokenizer.end_of_text)


def _tokenizer(before: dict[str, Any], decoder: dict[str, Any], model: dict[str, Any], end: int) -> dict[str, Any]:
    special = {"id": end, "content": END_OF_TEXT, "special": True, "normalized": False}
    special |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special],
        "normalizer": None,
        "pre_tokenizer": before,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def _printable_bytes() -> list[str]:
    """Return GPT-2's character for each byte: itself if it is printable, else one from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [value for value in range(256) if value not in printable]
    code = {**{value: value for value in printable}, **{value: 256 + i for i, value in enumerate(others)}}
    return [chr(code[value]) for value in range(256)]


_PRINTABLE = _printable_bytes()


def _printable(symbol: bytes) -> str:
    return "".join(_PRINTABLE[value] for value in symbol)


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"
