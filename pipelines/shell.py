"""Commands to paste: quoted for a shell, and free of what a terminal obeys."""

from __future__ import annotations

import shlex
from pathlib import Path


def command(*words: object) -> str:
    """The words as a line that a shell takes for the same words.

    A path that begins like an option, or like a home folder, is given a `./`.
    """
    return " ".join(_quoted(_as_argument(word)) for word in words)


def _as_argument(word: object) -> str:
    text = str(word)
    return f"./{text}" if isinstance(word, Path) and text.startswith(("-", "~")) else text


def _quoted(text: str) -> str:
    if text.isprintable():
        return shlex.quote(text)
    return f"$'{''.join(map(_in_ansi_quotes, text))}'"


def _in_ansi_quotes(char: str) -> str:
    """A character between `$'` and `'`: by its bytes where it cannot be printed, or is none of UTF-8."""
    if char.isprintable():
        return f"\\{char}" if char in "\\'" else char
    return "".join(f"\\x{byte:02x}" for byte in char.encode(errors="surrogateescape"))
