"""`--help` of every command: whole, plain, narrow enough, and with examples that work."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

from asgo_cli.app import app
from tests.command_lines import parse, tree

COMMANDS = [pytest.param(name, command, id=name) for name, command in tree()]


def help_of(name: str, width: int = 80) -> str:
    result = CliRunner(env={**os.environ, "COLUMNS": str(width)}).invoke(app, [*name.split()[1:], "--help"])
    assert result.exit_code == 0
    return result.stdout


def examples_of(name: str) -> list[str]:
    _, _, ending = help_of(name).partition("\n  Examples:\n")
    return [line.strip() for line in ending.splitlines()]


def examples() -> Iterator[Any]:
    for name, _ in tree():
        for line in examples_of(name):
            yield pytest.param(shlex.split(line.split(" > ")[0], comments=True), id=line)


@pytest.mark.parametrize(("name", "command"), COMMANDS)
def test_every_command_and_option_is_explained_in_plain_words(name: str, command: Any) -> None:
    assert command.help
    for parameter in command.params:
        assert parameter.help, parameter.name
    for kind in ("<str>", "<int", "<float", "<path>"):
        assert kind not in help_of(name)


@pytest.mark.parametrize(("name", "command"), COMMANDS)
def test_help_fits_a_terminal_and_is_not_cut(name: str, command: Any) -> None:
    lines = help_of(name).splitlines()
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines if line.endswith("...") and not line.startswith("Usage:")]


@pytest.mark.parametrize(("name", "command"), COMMANDS)
def test_every_command_has_examples_of_itself_that_no_width_breaks(name: str, command: Any) -> None:
    lines = examples_of(name)
    assert lines
    assert all(f"{line} ".startswith(f"{name} ") for line in lines)
    assert all(line in help_of(name, width=40) for line in lines)


@pytest.mark.parametrize("words", list(examples()))
def test_an_example_is_understood(words: list[str]) -> None:
    parse(words[1:])


@pytest.mark.parametrize("words", [each for each in examples() if each.values[0][1:2] == ["train"]])
def test_the_settings_of_a_training_example_are_good(words: list[str]) -> None:
    if {"--resume", "--branch"} & {*words}:
        pytest.skip("continues a run that does not exist here")
    result = CliRunner().invoke(app, [*words[1:], "--print-config"])
    assert result.exit_code == 0, result.output


def test_commands_are_listed_in_the_order_of_their_use() -> None:
    listed = [line.split()[0] for line in help_of("asgo").partition("Commands:\n")[2].partition("\n\n")[0].splitlines()]
    assert [listed.index(name) for name in ("demo", "data", "train", "compare", "generate")] == sorted(
        listed.index(name) for name in ("demo", "data", "train", "compare", "generate")
    )
