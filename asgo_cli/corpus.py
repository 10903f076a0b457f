"""`asgo data fineweb` and `asgo data openwebtext`: corpora of the Hugging Face hub, or local copies of their files."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.text import Text

from asgo_cli import console
from asgo_cli.data_folder import summarize
from asgo_cli.help_text import examples
from asgo_cli.live import LiveProgress
from pipelines.shell import command

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pipelines.data.corpus.corpus_to_shards import CorpusOptions
    from pipelines.data.corpus.pipeline import Status
    from pipelines.data.corpus.sources import Corpus

FINEWEB_EXAMPLES = examples(
    "asgo data fineweb --shards 10",
    "asgo data fineweb --subset CC-MAIN-2024-10",
    "asgo data fineweb --no-edu --out data/fineweb10B    # FineWeb itself",
    "asgo data fineweb --source /data/fineweb-edu    # a copy of the files",
)
OPENWEBTEXT_EXAMPLES = examples(
    "asgo data openwebtext --shards 10",
    "asgo data openwebtext --source /data/openwebtext    # a copy of the files",
)

Shards = Annotated[int, typer.Option(metavar="N", help="Training shards, in addition to the validation shard.")]
ShardTokens = Annotated[int, typer.Option(metavar="N", help="Tokens per shard.")]
Subset = Annotated[str | None, typer.Option(metavar="NAME", help="A subset (configuration) of the repository.")]
SourceOption = Annotated[
    str,
    typer.Option(
        "--source",
        metavar="hub|FOLDER",
        help="The hub (or its mirror HF_ENDPOINT), or a folder of the same files, .parquet or .jsonl.",
    ),
]
TextColumnOption = Annotated[
    str, typer.Option("--text-column", metavar="NAME", help="Name of the text in JSON lines and Parquet files.")
]
Workers = Annotated[int | None, typer.Option(metavar="N", help="Tokenizer processes.", show_default="one per core")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Start again, and replace existing shards.")]


def fineweb(
    shards: Shards = 10,
    shard_tokens: ShardTokens = 100_000_000,
    subset: Annotated[
        str | None, typer.Option(metavar="NAME", help="A subset of the repository.", show_default="sample-10BT")
    ] = None,
    edu: Annotated[bool, typer.Option("--edu/--no-edu", help="FineWeb-Edu, or FineWeb.")] = True,
    source: SourceOption = "hub",
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="The data folder to create.")] = Path("data/fineweb"),
    workers: Workers = None,
    text_column: TextColumnOption = "text",
    overwrite: Overwrite = False,
) -> None:
    """Stream FineWeb-Edu, or FineWeb, into shards of GPT-2 tokens.

    The first shard of the stream is the validation data. After an interruption, run the same command again to resume. A
    failed connection is retried; the command gives up after eight failures in a row, with pauses of 1 to 60 seconds.
    """
    from pipelines.data.corpus.corpus_to_shards import CorpusOptions
    from pipelines.data.corpus.sources import FINEWEB, FINEWEB_NO_EDU

    options = CorpusOptions(shards, shard_tokens, subset, source, workers, text_column=text_column)
    _prepare(FINEWEB if edu else FINEWEB_NO_EDU, out, options, overwrite)
    console.suggest_next(command("asgo", "train", "gpt", "--data", out))


def openwebtext(
    shards: Shards = 10,
    shard_tokens: ShardTokens = 100_000_000,
    subset: Subset = None,
    source: SourceOption = "hub",
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="The data folder to create.")] = Path("data/openwebtext"),
    workers: Workers = None,
    text_column: TextColumnOption = "text",
    overwrite: Overwrite = False,
) -> None:
    """Stream OpenWebText into shards of GPT-2 tokens.

    Every 2,000th document is validation data, a fraction of 0.0005. After an interruption, run the same command again
    to resume. A failed connection is retried; the command gives up after eight failures in a row, with pauses of 1 to
    60 seconds.
    """
    from pipelines.data.corpus.corpus_to_shards import CorpusOptions
    from pipelines.data.corpus.sources import OPENWEBTEXT

    _prepare(
        OPENWEBTEXT,
        out,
        CorpusOptions(shards, shard_tokens, subset, source, workers, text_column=text_column),
        overwrite,
    )
    console.suggest_next(command("asgo", "train", "gpt", "--preset", "asgo-gpt2", "--data", out))


def _prepare(corpus: Corpus, out: Path, options: CorpusOptions, overwrite: bool) -> None:
    from pipelines.data.corpus.corpus_to_shards import prepare_corpus
    from pipelines.data.manifest import UNFINISHED
    from pipelines.errors import AsgoError

    progress = _CorpusProgress(options.shards + 1, "network" if options.source == "hub" else "disk")
    try:
        with progress.bar:
            manifest = prepare_corpus(
                corpus, out, options, overwrite=overwrite, report=progress.show, notify=progress.note
            )
    except AsgoError:
        if overwrite and (out / UNFINISHED).exists():
            console.say("to resume instead of starting again, omit --overwrite")
        raise
    summarize(manifest, out)


class _CorpusProgress:
    """Progress in two live lines on a terminal, while `bar` is entered; elsewhere, one plain line per minute."""

    def __init__(self, shards: int, medium: str) -> None:
        self._shards = shards
        self._medium = medium
        self._lines = console.MinuteLines()
        self.bar = _TwoLines(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[left]}"),
            transient=True,
        )
        self._task = self.bar.add_task("opening", total=None, left="")

    def note(self, message: str) -> None:
        """Write a line above the bar."""
        console.say(f"{self._medium}: {message}")

    def show(self, status: Status) -> None:
        """Update the bar."""
        shard = f"shard {min(status.finished_shards + 1, self._shards)} of {self._shards}"
        self.bar.below = self._metrics(status)
        self.bar.update(
            self._task,
            description=shard,
            completed=status.tokens,
            total=status.tokens_wanted,
            left=_time_left(status.seconds_left),
        )
        done = f"{status.tokens / status.tokens_wanted:.1%}"
        left = f"; {_time_left(status.seconds_left)}" if status.seconds_left is not None else ""
        self._lines.say(f"{shard}, {done}: {self._metrics(status)}{left}")

    def _metrics(self, status: Status) -> str:
        return (
            f"{status.documents:,} documents, {status.tokens / 1e6:,.1f} M tokens, "
            f"{status.tokens_per_s / 1e6:.2f} M tokens/s; "
            f"waiting: {self._medium} {status.reading_share:.0%}, tokenizer {status.tokenizing_share:.0%}"
        )


class _TwoLines(LiveProgress):
    """A progress bar with a line of metrics below it."""

    below = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.below, overflow="ellipsis", no_wrap=True)


def _time_left(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{datetime.timedelta(seconds=round(seconds))} left"
