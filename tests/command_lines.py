"""The commands of the program, and how it reads a line with one of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from typer.main import get_command

from asgo_cli.app import app


def parse(words: list[str]) -> None:
    """Have the program read a command line as it does, up to where it would begin to work."""
    name, command, context = "asgo", get_command(app), None
    while True:
        context = command.make_context(name, words, parent=context)
        if not hasattr(command, "resolve_command"):
            return
        name, command, words = command.resolve_command(context, [*context._protected_args, *context.args])


def tree(command: Any = None, name: str = "asgo") -> Iterator[tuple[str, Any]]:
    """The full name of every command and group of commands, with what Typer made of it."""
    command = command or get_command(app)
    yield name, command
    for inner_name, inner in getattr(command, "commands", {}).items():
        yield from tree(inner, f"{name} {inner_name}")
