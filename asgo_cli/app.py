"""The command tree and the one error boundary. Importing it must not import torch: `--help` stays instant."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import Annotated

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException
from typer.main import get_command

from asgo_cli import (
    bench,
    claim,
    compare,
    console,
    data,
    demo,
    doctor,
    export,
    export_model,
    generate,
    sweep,
    train,
    viz,
    worker,
)
from asgo_cli.help_text import examples
from asgo_cli.values import checking_values
from pipelines import errors, stopping

_ORDER = (
    "demo",
    "doctor",
    "data",
    "train",
    "sweep",
    "compare",
    "claim",
    "viz",
    "export-metrics",
    "export-model",
    "generate",
    "bench",
)


_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors of a disk that a restart would only repeat."""


class _InOrder(TyperGroup):
    """Lists the commands in the order in which a newcomer needs them."""

    def list_commands(self, ctx: object) -> list[str]:
        return sorted(self.commands, key=_ORDER.index)


app = typer.Typer(
    cls=_InOrder,
    help="Train with, and compare, neural-network optimizers.\n\n"
    "Exit codes: 0 done; 1 failed; 2 wrong usage or configuration; 75 interrupted and saved; 130 interrupted with "
    "nothing to save.",
    epilog=examples(
        "asgo demo",
        "asgo data text articles.jsonl --out data/mine",
        "asgo train gpt --preset tiny --data data/mine --optimizer asgo",
        "asgo compare runs",
    ),
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data.app, name="data")
app.add_typer(train.app, name="train")
app.command("sweep", epilog=sweep.EXAMPLES)(sweep.sweep)
app.command("claim", epilog=claim.EXAMPLES)(claim.claim)
app.command("compare", epilog=compare.EXAMPLES)(compare.compare)
app.command("viz", epilog=viz.EXAMPLES)(viz.viz)
app.command("export-metrics", epilog=export.EXAMPLES)(export.export_metrics)
app.command("export-model", epilog=export_model.EXAMPLES)(export_model.export_model)
app.command("generate", epilog=generate.EXAMPLES)(generate.generate)
app.add_typer(bench.app, name="bench")
app.command("demo", epilog=demo.EXAMPLES)(demo.demo)
app.command("doctor", epilog=doctor.EXAMPLES)(doctor.doctor)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version  # slow to import, and rarely wanted

        print(f"asgo {version('asgo')}")  # noqa: T201
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())  # noqa: T201


def main() -> None:
    """Run the command line and turn every error into one line and an exit code."""
    # Waiting OpenMP threads spin, 300,000 times by default: with other work on the same two cores, training fell from
    # 11,000 tokens per second to 500. With 10,000 spins it keeps 3,000, and without other work it is not slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    console.guard_streams()
    # A notebook passes on its own backend; where that is not installed, importing matplotlib fails.
    os.environ.pop("MPLBACKEND", None)
    if worker.is_worker():
        worker.begin_worker()
    try:
        code = checking_values(get_command(app))(standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()  # an error in Python's own flush at exit would print a traceback
    except SystemExit as ended:
        # Typer takes every broken pipe for one of stdout, and exits without a message.
        error = ended.__context__
        if not isinstance(error, BrokenPipeError) or error.filename == console.STDOUT:
            raise
        code = _report(error)
    except Exception as error:
        if os.environ.get("ASGO_DEBUG") == "1":
            raise
        # A library may have turned the `KeyboardInterrupt` into another error.
        interrupted = stopping.interrupted() and not isinstance(error, errors.AsgoError)
        code = stopping.INTERRUPTED if interrupted else _report(error)
    sys.exit(code if isinstance(code, int) else 0)


def _report(error: Exception) -> int:
    if isinstance(error, BrokenPipeError) and error.filename == console.STDOUT:
        return 1  # the reader, such as `head`, closed the pipe: no error for the user
    if sys.stdout is not None:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
    kind, code, message = _describe(error)
    if worker.is_worker():
        worker.end_worker(kind, code, message)
    elif kind == "stopped":
        console.say(f"stopped: {message}")
    else:
        console.fail(message)
    return code


def _describe(error: Exception) -> tuple[worker.Kind, int, str]:
    """Return the kind of outcome, the exit code, and the message."""
    from pipelines.errors import AsgoError, RunInterrupted

    if isinstance(error, RunInterrupted):
        return "stopped", error.exit_code, str(error)
    if worker.is_worker() and worker.is_lost_connection(error):
        return "consequence", 1, f"lost the connection to another process: {' '.join(str(error).split())}"
    if isinstance(error, AsgoError):
        return "refused", error.exit_code, str(error)
    if isinstance(error, TyperException):
        return "refused", error.exit_code, f"{' '.join(error.format_message().split())} (see --help)"
    if isinstance(error, OSError) and (error.filename is not None or error.errno in _REFUSALS):
        kind: worker.Kind = "refused" if error.errno in _REFUSALS else "crashed"
        return kind, 1, ": ".join(str(part) for part in (error.filename, error.strerror) if part is not None)
    return "crashed", 1, f"{type(error).__name__}: {error} (ASGO_DEBUG=1 shows where)"
