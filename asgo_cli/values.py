"""Checks for the values of all options: expand `~` in paths, refuse NaN."""

from __future__ import annotations

import math
import os
from typing import Any

import typer


def checking_values(command: Any) -> Any:
    """Add the checks to all options and arguments of the command and its subcommands; return the command."""
    for param in command.params:
        # Options that take a path or a name or URL are typed as text; their metavar says that a path is possible.
        if param.type.name == "path" or any(kind in (param.metavar or "") for kind in ("FILE", "FOLDER")):
            param.callback = _expand
        elif param.type.name in ("float", "float range"):
            param.callback = _refuse_nan
    for below in getattr(command, "commands", {}).values():
        checking_values(below)
    return command


def _expand(context: Any, param: Any, value: Any) -> Any:
    """Expand `~`: the shell does for `--out ~/runs`, but not for `--out=~/runs`."""
    if isinstance(value, list | tuple):
        return [_expand(context, param, each) for each in value]
    # Expand the typed text, not a Path: Path turns ./~x, a folder named ~x, into ~x.
    return os.path.expanduser(value) if isinstance(value, str) else value  # noqa: PTH111


def _refuse_nan(context: Any, param: Any, value: Any) -> Any:
    if isinstance(value, float) and math.isnan(value):
        raise typer.BadParameter("nan is not a number", context, param)
    return value
