"""What holds for the values of all options: `~` in a path is the home folder, and NaN is no number."""

from __future__ import annotations

import math
import os
from typing import Any

import typer


def checking_values(command: Any) -> Any:
    """The command, whose options and arguments, and those of all commands below it, treat values so."""
    for param in command.params:
        # Those that take a name or a URL as well are texts, and say in their metavar that they take a path.
        if param.type.name == "path" or any(kind in (param.metavar or "") for kind in ("FILE", "FOLDER")):
            param.callback = _expand
        elif param.type.name in ("float", "float range"):
            param.callback = _refuse_nan
    for below in getattr(command, "commands", {}).values():
        checking_values(below)
    return command


def _expand(context: Any, param: Any, value: Any) -> Any:
    """A shell expands `--out ~/runs`, but not `--out=~/runs`."""
    if isinstance(value, list | tuple):
        return [_expand(context, param, each) for each in value]
    # Of the text as it was typed: ./~x, which is a folder named ~x, is the same path as ~x.
    return os.path.expanduser(value) if isinstance(value, str) else value  # noqa: PTH111


def _refuse_nan(context: Any, param: Any, value: Any) -> Any:
    if isinstance(value, float) and math.isnan(value):
        raise typer.BadParameter("nan is not a number", context, param)
    return value
