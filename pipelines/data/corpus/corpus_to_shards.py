"""Convert a corpus of the hub to a folder of token shards; reads, tokenizes and writes in parallel, and resumes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from pipelines.data.corpus.encode import Backend
from pipelines.data.corpus.feed import Feed
from pipelines.data.corpus.folder import (
    Journal,
    finished_manifest,
    require_replaceable,
    save_journal,
    unfinished_journal,
)
from pipelines.data.corpus.pipeline import Pipeline, Status
from pipelines.data.corpus.sources import HUB, Corpus, CorpusSource, Position, build_source
from pipelines.data.corpus.split import SplitWriter
from pipelines.data.corpus.tokenizer_pool import TokenizerPool
from pipelines.data.holding import clear, held_folder
from pipelines.data.manifest import UNFINISHED, Manifest, write_manifest
from pipelines.data.shards import MAX_SHARD_TOKENS
from pipelines.data.tokenizers import Gpt2Tokenizer
from pipelines.errors import AsgoError, RunInterrupted, UsageError
from pipelines.stopping import StopRequest, stop_on_signals

_OPENING_POLL_S = 0.2


@dataclass(frozen=True)
class CorpusOptions:
    """`shards` training shards of `shard_tokens` tokens each; `source` is "hub" or a folder.

    Defaults: `subset`, the corpus's own; `workers`, one tokenizer per CPU core; `backend`, gigatoken if installed.
    """

    shards: int = 10
    shard_tokens: int = 100_000_000
    subset: str | None = None
    source: str = HUB
    workers: int | None = None
    backend: Backend | None = None
    text_column: str = "text"

    def check(self) -> None:
        """Raise `UsageError` for values out of range."""
        if self.shards < 1:
            raise UsageError(f"--shards must be at least 1, not {self.shards}")
        if not 1 <= self.shard_tokens <= MAX_SHARD_TOKENS:
            raise UsageError(f"--shard-tokens must lie between 1 and {MAX_SHARD_TOKENS:,}, not {self.shard_tokens:,}")
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"--workers must be at least 1, not {self.workers}")


def prepare_corpus(
    corpus: Corpus,
    out: Path,
    options: CorpusOptions,
    *,
    overwrite: bool = False,
    report: Callable[[Status], None],
    notify: Callable[[str], None],
) -> Manifest:
    """Tokenize a corpus into the folder `out`, or resume an earlier call with the same options.

    The shards depend only on the source and on `shards`, `shard_tokens` and `subset`. Calls `report` several times a
    second with the status, and `notify` with one line per failure that is retried.

    Raises:
        UsageError: wrong options, or `out` was made with others and `overwrite` is false.
        RunInterrupted: SIGTERM or SIGINT; the same call resumes.
        AsgoError: no network, a source that keeps failing or is damaged, a full disk, a lost process. The written
            tokens are kept, and the same call resumes.
    """
    options.check()
    source = build_source(corpus, options.source, options.subset, options.text_column)
    recipe = _recipe(source, options)
    with stop_on_signals() as stop, held_folder(out):
        if overwrite:
            require_replaceable(out)
        elif (manifest := finished_manifest(out, recipe)) is not None:
            (out / UNFINISHED).unlink(missing_ok=True)
            return manifest
        journal = None if overwrite else unfinished_journal(out, recipe)
        with (
            TokenizerPool(options.workers, options.backend) as pool,
            Feed(_pinned(source, journal), _start(journal), notify) as feed,
        ):
            revision = _open(feed, stop, out)
            if journal is None:
                require_replaceable(out)  # again: opening the source takes time, and files may have appeared
                clear(out)
                journal = Journal(recipe=recipe, revision=revision)
                save_journal(out, journal)
            elif journal.revision != revision:
                raise UsageError(
                    f"{source.name}: the files have changed since {out} was started; pass --overwrite to start again"
                )
            return _complete(feed, pool, out, options, journal, report, stop)


def _recipe(source: CorpusSource, options: CorpusOptions) -> dict[str, str | int]:
    recipe: dict[str, str | int] = {
        "corpus": source.corpus.name,
        "source": HUB if source.folder is None else str(source.folder),
        "shards": options.shards,
        "shard_tokens": options.shard_tokens,
    }
    if source.subset is not None:
        recipe["subset"] = source.subset
    if source.text_column != "text":  # folders from before this option existed must still compare equal
        recipe["text_column"] = source.text_column
    return recipe


def _pinned(source: CorpusSource, journal: Journal | None) -> CorpusSource:
    """Return the source at the journal's commit: the hub's files may change, and the work must resume with the same."""
    return source if journal is None or source.folder is not None else replace(source, revision=journal.revision)


def _start(journal: Journal | None) -> Position:
    """Return the position of the last batch written: read again, it shows whether the source has changed."""
    last = journal and journal.last_batch
    return last.position if last else Position(0, 0, 0)


def _open(feed: Feed, stop: StopRequest, out: Path) -> str:
    while (opened := feed.open(_OPENING_POLL_S)) is None:
        if stop:
            raise RunInterrupted(
                f"{stop.signal_name} while opening {feed.source.name}; run the same command again to resume"
            )
    return opened.revision


def _complete(
    feed: Feed,
    pool: TokenizerPool,
    out: Path,
    options: CorpusOptions,
    journal: Journal,
    report: Callable[[Status], None],
    stop: StopRequest,
) -> Manifest:
    corpus = feed.source.corpus
    try:
        with SplitWriter(out, options.shards, options.shard_tokens, corpus.validate_every, journal.writers) as writer:
            pipeline = Pipeline(feed, pool, writer, out, journal, report)
            pipeline.run(stop)
            manifest = Manifest(
                source=feed.source.name,
                revision=journal.revision,
                recipe=journal.recipe,
                tokenizer=Gpt2Tokenizer().describe(),
                documents=pipeline.documents,
                shards=writer.finish(),
            )
        write_manifest(out, manifest)
    except OSError as error:
        raise AsgoError(
            f"{error.filename or out}: {error.strerror}; the written tokens are kept: "
            "run the same command again to resume"
        ) from None
    with contextlib.suppress(OSError):
        (out / UNFINISHED).unlink()
    return manifest
