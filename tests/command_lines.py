"""The commands of the program, how it reads a line with one of them, and what it then does."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from typer.main import get_command

from asgo_cli import app as command_line
from asgo_cli.app import app


@dataclass(frozen=True)
class Result:
    """What a command returned and printed."""

    code: int
    out: str
    err: str


def asgo(*words: object, folder: Path | str = ".") -> Result:
    """Run a command in this process, in `folder`, through the error boundary."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(folder),
        mock.patch.object(sys, "argv", ["asgo", *map(str, words)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        command_line.main()
    return Result(int(ended.value.code or 0), out.getvalue(), err.getvalue())


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
