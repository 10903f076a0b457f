"""Commands for users to paste: quoted for a shell, without terminal control characters."""

from __future__ import annotations

import shlex
from pathlib import Path


def command(*words: object) -> str:
    """Quote the words and join them to a command line for a shell.

    A path that begins with `-` or `~` gets the prefix `./`.
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
    """Escape a character for `$'...'`: as bytes if it is not printable or not valid UTF-8."""
    if char.isprintable():
        return f"\\{char}" if char in "\\'" else char
    return "".join(f"\\x{byte:02x}" for byte in char.encode(errors="surrogateescape"))
