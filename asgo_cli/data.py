"""`asgo data`: convert text to token shards. data_folder.py has the commands that inspect data folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.progress import TaskProgressColumn, TimeRemainingColumn

from asgo_cli import console, corpus, data_folder, imagenet, images
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

OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an existing data folder.")]


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
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="The data folder to create.")],
    tokenizer: Annotated[Literal["gpt2", "bytes", "chars"], typer.Option(help="Tokenizer.")] = "gpt2",
    val_fraction: Annotated[float, typer.Option(metavar="X", help="Fraction of the text for validation.")] = 0.0005,
    shard_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens per training shard.")] = 100_000_000,
    text_column: corpus.TextColumnOption = "text",
    overwrite: OverwriteOption = False,
) -> None:
    """Convert text to token shards.

    A .txt file is one document, and so is any other file that you pass; a line of .jsonl or .json and a row of
    .parquet is one, with its text under --text-column. gzip and zstd are decompressed.
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
    """Return options for the next command if a part is too short for the preset's windows; warn in that case."""
    from pipelines.resolve import read_preset

    context_length = read_preset("tiny")["model"]["context_length"]
    validation, *training = (shard.tokens for shard in manifest.shards)
    if validation <= context_length:
        console.warn(
            f"the validation part has {validation:,} tokens, too few for a window of {context_length:,} and one more "
            "(GPT-2's windows have 1,024); use a larger --val-fraction, with --overwrite"
        )
    shortest = min(validation, max(training))
    if shortest > context_length:
        return []
    return ["--set", f"model.context_length={max(1, shortest - 1)}"]


@app.command("shakespeare", epilog=SHAKESPEARE_EXAMPLES)
def shakespeare(
    text_input: Annotated[
        str | None,
        typer.Option("--input", metavar="FILE|URL", help="The text; by default, tinyshakespeare is downloaded."),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="The data folder to create.")] = Path(
        "data/shakespeare_char"
    ),
    overwrite: OverwriteOption = False,
) -> None:
    """Convert Shakespeare's text to shards of characters.

    The first nine tenths are training data, the last tenth is validation data.
    """
    from pipelines.data.shakespeare import prepare_shakespeare

    progress = _CharactersProgress()
    with progress.bar:
        manifest = prepare_shakespeare(text_input, out, overwrite=overwrite, progress=progress.show)
    data_folder.summarize(manifest, out)
    console.suggest_next(command("asgo", "train", "gpt", "--preset", "asgo-nanogpt", "--data", out))


class _CharactersProgress(WorkProgress):
    """Progress bar of the characters done in a phase."""

    def __init__(self) -> None:
        super().__init__(TaskProgressColumn(), TimeRemainingColumn())

    def show(self, phase: str, done: int, total: int | None) -> None:
        """Update the bar; `total` is None if unknown."""
        line = f"{phase}: {done:,}{f' of {total:,}' if total else ''} characters"
        self._show(f"{phase} {done / 1e6:,.1f} M characters", done, total, line)


app.command("fineweb", epilog=corpus.FINEWEB_EXAMPLES)(corpus.fineweb)
app.command("openwebtext", epilog=corpus.OPENWEBTEXT_EXAMPLES)(corpus.openwebtext)
app.command("imagenet", epilog=imagenet.EXAMPLES)(imagenet.imagenet)
app.command("images", epilog=images.EXAMPLES)(images.images)
app.command("info", epilog=data_folder.INFO_EXAMPLES)(data_folder.info)
app.command("verify", epilog=data_folder.VERIFY_EXAMPLES)(data_folder.verify)
