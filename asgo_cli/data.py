"""`asgo data`: text into token shards; what looks at them is in data_folder.py."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.progress import TaskProgressColumn, TimeRemainingColumn

from asgo_cli import console, corpus, data_folder, imagenet
from asgo_cli.help_text import examples
from asgo_cli.progress import WorkProgress
from pipelines.shell import command

if TYPE_CHECKING:
    from pipelines.data.manifest import Manifest

app = typer.Typer(
    help="Prepare and check data.",
    epilog=examples(
        "asgo data fineweb --shards 10", "asgo data text books/ --out data/books", "asgo data info data/books"
    ),
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

TEXT_EXAMPLES = examples(
    "asgo data text articles.jsonl.gz books/ --out data/mine",
    "asgo data text poems.txt --tokenizer chars --out data/poems",
)
SHAKESPEARE_EXAMPLES = examples(
    "asgo data shakespeare",
    "asgo data shakespeare --input input.txt    # without a network",
)

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
            metavar="FILE...",
            help="Files ending in .txt, .jsonl, .json, .parquet, also .gz and .zst, or folders of them.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="The data folder to make.")],
    tokenizer: Annotated[Literal["gpt2", "bytes", "chars"], typer.Option(help="How text becomes tokens.")] = "gpt2",
    val_fraction: Annotated[float, typer.Option(metavar="X", help="Share of the text that validates.")] = 0.0005,
    shard_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens in a training shard.")] = 100_000_000,
    text_column: corpus.TextColumnOption = "text",
    overwrite: OverwriteOption = False,
) -> None:
    """Turn text into token shards.

    A .txt file is one document, and so is a file of any other kind that is named; a line of .jsonl or .json or a row
    of .parquet is one, under the name that --text-column gives. gzip and zstd are unpacked.
    """
    from pipelines.data.text_to_shards import prepare_text

    progress = _CharactersProgress()
    with progress.bar:
        manifest = prepare_text(
            inputs,
            out,
            tokenizer=tokenizer,
            val_fraction=val_fraction,
            shard_tokens=shard_tokens,
            overwrite=overwrite,
            text_column=text_column,
            progress=progress.show,
            notify=console.say,
        )
    data_folder.summarize(manifest, out)
    console.suggest_next(
        command("asgo", "train", "gpt", "--preset", "tiny", "--data", out, *_shorter_windows(manifest))
    )


def _shorter_windows(manifest: Manifest) -> list[str]:
    """What to add to the next command where a part is too short for the preset's windows, with a warning."""
    from pipelines.resolve import read_preset

    context_length = read_preset("tiny")["model"]["context_length"]
    validation, *training = (shard.tokens for shard in manifest.shards)
    if validation <= context_length:
        console.warn(
            f"the validation part has {validation:,} tokens, too few for a window of {context_length:,} and one more, "
            "and GPT-2's windows have 1,024; a larger --val-fraction, with --overwrite, gives it more"
        )
    shortest = min(validation, max(training))
    if shortest > context_length:
        return []
    return ["--set", f"model.context_length={max(1, shortest - 1)}"]


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

    progress = _CharactersProgress()
    with progress.bar:
        manifest = prepare_shakespeare(text_input, out, overwrite=overwrite, progress=progress.show)
    data_folder.summarize(manifest, out)
    console.suggest_next(command("asgo", "train", "gpt", "--preset", "asgo-nanogpt", "--data", out))


class _CharactersProgress(WorkProgress):
    """How many characters are done of a phase."""

    def __init__(self) -> None:
        super().__init__(TaskProgressColumn(), TimeRemainingColumn())

    def show(self, phase: str, done: int, total: int | None) -> None:
        """Show how far it is; `total` is None where nobody knows."""
        line = f"{phase}: {done:,}{f' of {total:,}' if total else ''} characters"
        self._show(f"{phase} {done / 1e6:,.1f} M characters", done, total, line)


app.command("fineweb", epilog=corpus.FINEWEB_EXAMPLES)(corpus.fineweb)
app.command("openwebtext", epilog=corpus.OPENWEBTEXT_EXAMPLES)(corpus.openwebtext)
app.command("imagenet", epilog=imagenet.EXAMPLES)(imagenet.imagenet)
app.command("info", epilog=data_folder.INFO_EXAMPLES)(data_folder.info)
app.command("verify", epilog=data_folder.VERIFY_EXAMPLES)(data_folder.verify)
