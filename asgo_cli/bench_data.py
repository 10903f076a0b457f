"""`asgo bench data`, `loader` and `archives`: text to shards, photographs to batches, archives to images."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from asgo_cli import console
from asgo_cli.help_text import examples
from asgo_cli.progress import TurnsProgress
from pipelines.errors import UsageError

if TYPE_CHECKING:
    from pipelines.benchmarks.corpus import CorpusReport
    from pipelines.benchmarks.decoded_loader import DecodedLoaderReport
    from pipelines.benchmarks.imagenet_archives import ArchivesReport
    from pipelines.benchmarks.loader import LoaderReport

DATA_EXAMPLES = examples(
    "asgo bench data",
    "asgo bench data articles.jsonl --workers 8 --json",
)
LOADER_EXAMPLES = examples(
    "asgo bench loader",
    "asgo bench loader photographs/ --workers 8 --json",
    "asgo bench loader --decoded",
)
ARCHIVES_EXAMPLES = examples(
    "asgo bench archives",
    "asgo bench archives --classes 100 --images 100",
)

Repeats = Annotated[int, typer.Option(min=1, metavar="N", help="Rounds.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print everything, each round too, as JSON.")]


def data(
    inputs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FILE...]",
            help="Text files or folders of them, as for `asgo data text`; default: Python's standard library.",
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Tokenizer processes.", show_default="one per core")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Rounds.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything, each round too, as JSON.")] = False,
) -> None:
    """Measure how fast token shards are written and batches read.

    Measures in turns, from a Parquet file to tokens on disk: a plain multiprocessing.Pool that encodes one document per
    call and returns lists, as public scripts do, and asgo with tiktoken and, if installed, gigatoken.
    """
    from pipelines.benchmarks.corpus import bench_corpus

    progress = TurnsProgress()
    with progress.bar:
        report = bench_corpus(inputs or (), workers, repeats, progress.advance)
    if as_json:
        console.show_json(report.as_json())
    else:
        _show_corpus(report)
    console.suggest_next("asgo data fineweb --shards 10")


def loader(
    inputs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FILE...]", help="Photographs or folders of them; default: one of matplotlib's."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Processes that decode.", show_default="one per core")
    ] = None,
    decoded: Annotated[
        bool, typer.Option("--decoded", help="Measure decoded images of 32 x 32 pixels, shifted and mirrored.")
    ] = False,
    repeats: Repeats = 5,
    as_json: AsJson = False,
) -> None:
    """Measure the speed of decoding photographs into batches.

    Measures in turns, with photographs of 500 x 375 pixels and the paper's transform: torchvision's ImageFolder in a
    DataLoader, and asgo from files, from an archive, and with exactly torchvision's pixels. With --decoded: random
    crops and flips of small images, by torchvision's transforms in a DataLoader and by asgo.
    """
    if decoded and inputs:
        raise UsageError(f"--decoded: measures random pixels, not {inputs[0]}; leave one of them out")
    progress = TurnsProgress()
    report: LoaderReport | DecodedLoaderReport
    with progress.bar:
        if decoded:
            from pipelines.benchmarks.decoded_loader import bench_decoded_loader

            report = bench_decoded_loader(workers, repeats, progress.advance)
        else:
            from pipelines.benchmarks.loader import bench_loader

            report = bench_loader(inputs or (), workers, repeats, progress.advance)
    if as_json:
        console.show_json(report.as_json())
    elif decoded:
        _show_decoded_loader(cast("DecodedLoaderReport", report))
    else:
        _show_loader(cast("LoaderReport", report))
    console.suggest_next("asgo bench archives")


def archives(
    classes: Annotated[int, typer.Option(min=1, metavar="N", help="Classes.")] = 20,
    images: Annotated[int, typer.Option(min=1, metavar="N", help="Training images per class.")] = 100,
    workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Threads that extract.", show_default="one per core")
    ] = None,
    repeats: Repeats = 3,
    as_json: AsJson = False,
) -> None:
    """Measure the speed of extracting ImageNet's archives.

    Measures in turns, on synthetic archives: extraction by asgo and by torchvision's parser, both with the check of the
    digests; and indexing of 100,000 nested members by asgo and by Python's tarfile.
    """
    from pipelines.benchmarks.imagenet_archives import bench_archives

    progress = TurnsProgress()
    with progress.bar:
        report = bench_archives(classes, images, workers, repeats, progress.advance)
    if as_json:
        console.show_json(report.as_json())
    else:
        _show_archives(report)
    console.suggest_next("asgo bench loader")


def _show_corpus(report: CorpusReport) -> None:
    console.show_table(
        ["", "M tokens/s", "± %", f"× {report.contestants[0].name}"],
        [
            [
                each.name,
                console.figure(each.median, 1e-6),
                f"{100 * each.spread:.0f}",
                console.figure(each.speedup(report.contestants[0])),
            ]
            for each in report.contestants
        ],
        title=f"{report.documents:,} documents, {report.bytes / 1e6:,.1f} MB; {report.workers} workers",
    )
    if not report.same_tokens:
        console.warn("the tokens are not the same")
    console.say(
        "medians over the rounds; ±: half the interquartile range; "
        f"{report.contestants[0].tokens:,} tokens, {'the same' if report.same_tokens else 'NOT the same'} from all"
    )
    times = report.batches_per_s / report.h100_tokens_per_s
    console.say(
        f"training batches, one thread: {report.batches_per_s / 1e6:,.1f} M tokens/s, {times:,.0f} times what an H100 "
        f"consumes with GPT-2 124 M ({report.h100_tokens_per_s:,} a second)"
    )


def _show_loader(report: LoaderReport) -> None:
    cores = max(1, report.workers)
    console.show_table(
        ["", "images/s", "images/s a core", f"× {report.contestants[0].name}"],
        [
            [
                each.name,
                console.figure(each.median),
                console.figure(each.median / cores),
                console.figure(report.speedup(each.name)),
            ]
            for each in report.contestants
        ],
        title=f"{report.photographs} photographs of {report.image_bytes / 1e3:.0f} kB; {report.workers} workers",
    )
    as_json = report.as_json()
    console.say(
        f"from the archive {as_json['archives_over_files']:.2f} times as fast as from files; pixels differ from "
        f"torchvision's by {report.mean_difference:.2f} of 255 in the mean, {report.largest_difference:.0f} at most"
    )


def _show_decoded_loader(report: DecodedLoaderReport) -> None:
    first, *_ = report.contestants
    console.show_table(
        ["", "images/s", "± %", f"× {first.name}"],
        [
            [each.name, console.figure(each.median), f"{100 * each.spread:.0f}", console.figure(each.speedup(first))]
            for each in report.contestants
        ],
        title=f"images of 32 x 32 pixels; torchvision with {report.workers} workers, asgo in one thread",
    )


def _show_archives(report: ArchivesReport) -> None:
    rows = [("asgo", report.asgo_s, report.index_s), ("torchvision; tarfile", report.torchvision_s, report.tarfile_s)]
    console.show_table(
        ["", "extraction s", f"index of {report.index_members:,} s"],
        [
            [name, console.figure(statistics.median(extraction)), console.figure(statistics.median(index))]
            for name, extraction, index in rows
        ],
        title=f"{report.images:,} images, {report.bytes / 1e6:,.0f} MB; {report.workers} workers",
    )
    console.say(f"extraction {report.speedup:.2f} times as fast as torchvision's")
