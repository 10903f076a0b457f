"""`asgo data`: text into token shards, and a check of them."""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from asgo_cli import console

if TYPE_CHECKING:
    from pipelines.data.manifest import DocumentCounts, Manifest

app = typer.Typer(
    help="Prepare and check data.",
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

TEXT_EXAMPLES = "Example: `asgo data text articles.jsonl.gz books/ --tokenizer gpt2 --out data/mine`"
SHAKESPEARE_EXAMPLES = "Example: `asgo data shakespeare`, or offline `asgo data shakespeare --input input.txt`"
VERIFY_EXAMPLES = "Example: `asgo data verify data/mine`"

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
    _summarize(manifest, out)
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
    _summarize(manifest, out)
    console.suggest_next(f"asgo train gpt --preset asgo-nanogpt --data {_quoted(out)}")


@app.command("verify", epilog=VERIFY_EXAMPLES)
def verify(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A data folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="The result as JSON on stdout.")] = False,
) -> None:
    """Check shards against their manifest.

    Finds any altered byte, and missing or foreign shards.
    """
    from dataclasses import asdict

    from pipelines.data.verify import verify as verify_folder
    from pipelines.errors import AsgoError

    results = verify_folder(folder)
    if as_json:
        console.show_json([asdict(result) for result in results])
    else:
        console.show_table(
            ("file", "tokens", "documents", "state"),
            [(r.file, f"{r.tokens:,}", f"{r.documents:,}", r.problem or "good") for r in results],
        )
    bad = [result.file for result in results if result.problem]
    if bad:
        raise AsgoError(
            f"{folder}: {len(bad)} of {len(results)} shards are bad, the first is {bad[0]}; "
            "make the folder again, or copy the bad ones again"
        )
    console.suggest_next(f"asgo train gpt --data {_quoted(folder)}")


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _summarize(manifest: Manifest, out: Path) -> None:
    rows = []
    for part, shards in (("training", manifest.shards[1:]), ("validation", manifest.shards[:1])):
        tokens, documents = (sum(getattr(shard, what) for shard in shards) for what in ("tokens", "documents"))
        rows.append((part, f"{len(shards):,}", f"{documents:,}", f"{tokens:,}"))
    console.show_table(("part", "shards", "documents", "tokens"), rows, title=str(out))
    _tell_counts(manifest.documents)


def _tell_counts(documents: DocumentCounts) -> None:
    """Say what in the source was not plain text, and what became of it."""
    fates = {
        "empty": "empty: left out",
        "not_text": "not text: left out",
        "repaired": "not valid Unicode: each bad byte or lone surrogate became U+FFFD",
        "literal_end_of_text": 'with a literal "<|endoftext|>": kept as ordinary text',
    }
    for name, fate in fates.items():
        if count := getattr(documents, name):
            console.warn(f"{count:,} of {documents.read:,} documents were {fate}")


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
