"""Output for the user: messages on stderr, data on stdout."""

from __future__ import annotations

import io
import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from time import monotonic
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

SECONDS_BETWEEN_LINES = 60.0

words = Console(stderr=True, highlight=False, emoji=False)
data = Console(highlight=False, emoji=False)


STDOUT = "stdout"
"""File name in errors of writing to stdout."""


class _Words(io.FileIO):
    """Stderr whose writes never fail: a broken pipe, a closed terminal or a full disk must not end the work."""

    def write(self, text: ReadableBuffer, /) -> int:
        try:
            written: int | None = super().write(text)  # None where the stream would block
        except OSError:
            written = None
        return memoryview(text).nbytes if written is None else written


class _Data(io.FileIO):
    """Stdout that raises its first error only: Python flushes its buffer again at exit, and would fail again."""

    _failed = False

    def write(self, content: ReadableBuffer, /) -> int:
        if self._failed:
            return memoryview(content).nbytes
        try:
            return super().write(content)
        except OSError as error:
            self._failed = True
            error.filename = STDOUT
            raise


def guard_streams() -> None:
    """Make the whole process ignore errors of stderr, and name stdout in its errors.

    Covers everything that writes through `sys.stderr`: rich, warnings, logging, tracebacks.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the free number: a file opened later must not become stdout
    if sys.stdout is sys.__stdout__ and sys.stdout is not None:
        sys.stdout = _rewrapped(sys.stdout, _Data(1, "w", closefd=False))
    if sys.stderr is sys.__stderr__ and sys.stderr is not None:
        sys.stderr = _rewrapped(sys.stderr, _Words(2, "w", closefd=False))


def _rewrapped(stream: TextIO, raw: io.FileIO) -> TextIO:
    return io.TextIOWrapper(
        io.BufferedWriter(raw), stream.encoding, stream.errors, line_buffering=stream.isatty() or raw.fileno() == 2
    )


def silence() -> None:
    """Show nothing from now on except the error that ends the command."""
    words.quiet = data.quiet = True


def is_live() -> bool:
    """Return whether stderr can show a line that changes: a terminal, and not a dumb one."""
    return words.is_terminal and words.is_interactive and not words.quiet


def say(message: str) -> None:
    """Print a line."""
    words.print(_shown(message), soft_wrap=True)


class MinuteLines:
    """Progress lines where no live line is shown, as in a log: the first at once, then at most one a minute."""

    def __init__(self) -> None:
        self._said_s = -math.inf

    def say(self, line: str, *, is_last: bool = False) -> None:
        """Print the line if a minute has passed or if it is the last."""
        if not is_live() and (is_last or monotonic() - self._said_s >= SECONDS_BETWEEN_LINES):
            self._said_s = monotonic()
            say(line)


def warn(message: str) -> None:
    """Print a warning, a line."""
    words.print(f"[yellow]warning:[/] {_shown(message)}", soft_wrap=True)


def fail(message: str) -> None:
    """Print the error that ended the command; each line of the message as an error of its own."""
    words.quiet = False
    for line in message.split("\n"):
        words.print(f"[bold red]error:[/] {_shown(line)}", soft_wrap=True)


def _shown(text: str) -> str:
    """Escape markup and control characters, which names of files and typed text may contain."""
    return escape("".join(char if char.isprintable() else ascii(char)[1:-1] for char in text))


def suggest_next(*commands: str) -> None:
    """Print the commands that are useful next."""
    label = "next:"
    for command in commands:
        words.print(f"[dim]{label:<5}[/] [bold]{_shown(command)}[/]", soft_wrap=True)
        label = ""


def show_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """Print a table on stdout: text in the first column, right-aligned numbers in the others."""
    table = Table(title=title and "\n".join(map(_shown, title.split("\n"))), title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(_shown(cell) for cell in row))
    data.print(table)


def show_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Print names and texts on stdout, one pair a line."""
    grid = Table.grid(padding=(0, 3))
    for name, text in facts:
        grid.add_row(f"[bold]{_shown(name)}[/]", _shown(text))
    data.print(grid)


def show_json(value: object) -> None:
    """Print a JSON document on stdout; floats read back exactly. Raises `ValueError` for NaN and infinities."""
    json.dump(value, sys.stdout, indent=2, allow_nan=False)
    sys.stdout.write("\n")


def figure(value: float | None, scale: float = 1.0) -> str:
    """Return `scale * value` with three digits, two below 1; empty for None."""
    if value is None:
        return ""
    scaled = scale * value
    if scaled < 1:
        return f"{scaled:.2g}"
    return f"{scaled:,.0f}" if scaled >= 100 else f"{scaled:.1f}" if scaled >= 10 else f"{scaled:.2f}"
