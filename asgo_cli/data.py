"""`asgo data`: text into token shards; what looks at them is in data_folder.py."""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer

from asgo_cli import console, corpus, data_folder, imagenet

app = typer.Typer(
    help="Prepare and check data.",
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

TEXT_EXAMPLES = "Example: `asgo data text articles.jsonl.gz books/ --tokenizer gpt2 --out data/mine`"
SHAKESPEARE_EXAMPLES = "Example: `asgo data shakespeare`, or offline `asgo data shakespeare --input input.txt`"

_SECONDS_BETWEEN_LINES = 10.0

OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace a data folder that is already there.")]


@app.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())  # noqa: T201


@app.command("text", epilog=TEXT_EXAMPLES)
def text(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...", help="Files ending in .txt, .jsonl, .jsonl.gz, .parquet, or folders of them."
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="The data folder to make.")],
    tokenizer: Annotated[Literal["gpt2", "bytes", "chars"], typer.Option(help="How text becomes tokens.")] = "gpt2",
    val_fraction: Annotated[float, typer.Option(help="Share of the text that validates.")] = 0.0005,
    shard_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens in a training shard.")] = 100_000_000,
    overwrite: OverwriteOption = False,
) -> None:
    """Turn text into token shards.

    A .txt file is one document, and so is a file of any other kind that is named; a line of .jsonl or a row of
    .parquet is one, under the name "text".
    """
    from pipelines.data.prepare import prepare_text

    with _progress() as progress:
        manifest = prepare_text(
            inputs,
            out,
            tokenizer=tokenizer,
            val_fraction=val_fraction,
            shard_tokens=shard_tokens,
            overwrite=overwrite,
            progress=progress,
        )
    data_folder.summarize(manifest, out)
    console.suggest_next(f"asgo train gpt --preset tiny --data {_quoted(out)}")


@app.command("shakespeare", epilog=SHAKESPEARE_EXAMPLES)
def shakespeare(
    text_input: Annotated[
        str | None,
        typer.Option("--input", metavar="FILE|URL", help="The text; without it the well-known one is downloaded."),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="The data folder to make.")] = Path(
        "data/shakespeare_char"
    ),
    overwrite: OverwriteOption = False,
) -> None:
    """Make shards of Shakespeare by characters.

    The first nine tenths train, the last one validates.
    """
    from pipelines.data.shakespeare import prepare_shakespeare

    with _progress() as progress:
        manifest = prepare_shakespeare(text_input, out, overwrite=overwrite, progress=progress)
    data_folder.summarize(manifest, out)
    console.suggest_next(f"asgo train gpt --preset asgo-nanogpt --data {_quoted(out)}")


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int | None], None]]:
    """Shows (phase, characters done, total or None): a bar on a terminal, now and then a line elsewhere."""
    if not console.words.is_terminal:
        yield _lines()
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console.words, transient=True) as bar:
        task = bar.add_task("reading", total=None)

        def show(phase: str, done: int, total: int | None) -> None:
            bar.update(task, description=f"{phase} {done / 1e6:,.1f} M characters", completed=done, total=total)

        yield show


def _lines() -> Callable[[str, int, int | None], None]:
    spoken_at = time.monotonic()

    def show(phase: str, done: int, total: int | None) -> None:
        nonlocal spoken_at
        if time.monotonic() - spoken_at < _SECONDS_BETWEEN_LINES:
            return
        spoken_at = time.monotonic()
        console.say(f"{phase}: {done:,}{f' of {total:,}' if total else ''} characters")

    return show


app.command("fineweb", epilog=corpus.FINEWEB_EXAMPLES)(corpus.fineweb)
app.command("openwebtext", epilog=corpus.OPENWEBTEXT_EXAMPLES)(corpus.openwebtext)
app.command("imagenet", epilog=imagenet.EXAMPLES)(imagenet.imagenet)
app.command("info", epilog=data_folder.INFO_EXAMPLES)(data_folder.info)
app.command("verify", epilog=data_folder.VERIFY_EXAMPLES)(data_folder.verify)
