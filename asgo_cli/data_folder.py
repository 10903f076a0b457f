"""`asgo data info` and `asgo data verify`: show and check the content of a data folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal
from rich.progress import DownloadColumn, TimeRemainingColumn, TransferSpeedColumn

from asgo_cli import console
from asgo_cli.help_text import examples
from asgo_cli.progress import PhaseProgress, WorkProgress
from pipelines.shell import command

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipelines.data.images.manifest import ClassEntry, ImageManifest
    from pipelines.data.info import FolderInfo
    from pipelines.data.manifest import DocumentCounts, Manifest, ShardEntry, SourcePosition

INFO_EXAMPLES = examples(
    "asgo data info data/mine",
    "asgo data info data/mine --lines 20",
    "asgo data info data/imagenet --contact-sheet sheet.png",
)
VERIFY_EXAMPLES = examples(
    "asgo data verify data/mine",
    "asgo data verify data/imagenet --json",
)

_MOST_CLASSES, _FIRST_CLASSES = 40, 20  # with more than 40 classes, the table shows the first 20

FolderArgument = Annotated[Path, typer.Argument(metavar="FOLDER", help="A data folder.")]


def info(
    folder: FolderArgument,
    lines: Annotated[
        int, typer.Option(min=0, metavar="N", help="Number of training documents to show a line of; not for images.")
    ] = 3,
    contact_sheet: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw some labelled images to a .png, .pdf or .svg file; only for images."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON on stdout.")] = False,
) -> None:
    """Show what a data folder holds.

    Shows the source, the shards, and how the first documents begin; for images, their number in each class.
    Trusts the manifest and reads only what it shows, so it is fast for large folders too.
    """
    from pipelines.data.images.manifest import holds_images

    if holds_images(folder):
        _show_images(folder, contact_sheet, as_json)
    else:
        _show_shards(folder, lines, contact_sheet, as_json)


def _show_images(folder: Path, contact_sheet: Path | None, as_json: bool) -> None:
    from pipelines.data.images.manifest import load_image_manifest

    manifest = load_image_manifest(folder)
    problems: Sequence[str] = ()
    if contact_sheet is not None:
        from pipelines.analysis.contact_sheet import draw_contact_sheet

        problems = draw_contact_sheet(folder, contact_sheet)
    if as_json:
        console.show_json(manifest.model_dump(mode="json"))
    else:
        console.show_facts(_image_facts(manifest))
        _show_classes(manifest)
    for problem in problems:
        console.warn(problem)
    if contact_sheet is not None:
        console.say(f"wrote {contact_sheet}")
    _suggest_training(folder)


def _image_facts(manifest: ImageManifest) -> Iterator[tuple[str, str]]:
    hub = manifest.recipe.get("source") == "hub"
    commit = f", the hub's copy at {manifest.revision or 'an unknown commit'}" if hub else ""
    yield "source", f"{manifest.dataset}{commit}"
    yield "images", _place_of_images(manifest)
    needed = "must stay there" if manifest.containers else "no longer needed"
    yield "made from", f"{manifest.source_folder} ({needed})"
    yield "classes", f"{len(manifest.classes):,}"
    for split in ("train", "validation"):
        counts = [getattr(each, split) for each in manifest.classes]
        spread = f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,} to {max(counts):,}"
        yield split, f"{_count(sum(counts), 'image')}, {spread} per class"
    yield "fingerprint", manifest.fingerprint


def _place_of_images(manifest: ImageManifest) -> str:
    if manifest.layout == "extracted":
        return "files in train and val"
    if manifest.containers:
        return f"left in {', '.join(sorted({*manifest.containers.values()}))}"
    if manifest.image_shape is None:
        return "in train.images and val.images"
    height, width, channels = manifest.image_shape
    colours = "grey" if channels == 1 else "in colour"
    return f"pixels in train.images and val.images, {width} x {height}, {colours}"


def _show_classes(manifest: ImageManifest) -> None:
    classes = manifest.classes
    shown = classes if len(classes) <= _MOST_CLASSES else classes[:_FIRST_CLASSES]
    rows = [(_class_label(each), f"{each.train:,}", f"{each.validation:,}") for each in shown]
    console.show_table(("class", "train", "validation"), rows)
    if len(shown) < len(classes):
        console.say(f"and {len(classes) - len(shown):,} more classes; --json shows all")


def _class_label(entry: ClassEntry) -> str:
    return _visible(entry.id if entry.name == entry.id else f"{entry.id} {entry.name}")


def _suggest_training(folder: Path) -> None:
    from pipelines.data.images.manifest import load_image_manifest

    task = "imagenet" if load_image_manifest(folder).importer == "imagenet" else "images"
    console.suggest_next(command("asgo", "train", task, "--data", folder))


def _show_shards(folder: Path, lines: int, contact_sheet: Path | None, as_json: bool) -> None:
    from pipelines.data.info import describe
    from pipelines.errors import UsageError

    found = describe(folder, lines)
    if contact_sheet is not None:
        raise UsageError(f"{folder}: holds token shards; --contact-sheet is only for images")
    if as_json:
        console.show_json(_as_json(found))
    else:
        console.show_facts(_facts(found))
        console.show_table(
            ("file", "tokens", "documents", "size"),
            [
                (shard.file, f"{shard.tokens:,}", f"{shard.documents:,}", "missing" if size is None else decimal(size))
                for shard, size in zip(found.manifest.shards, found.sizes, strict=True)
            ],
        )
        _show_lines("training", found.training)
        _show_lines("validation", found.validation)
    console.suggest_next(command("asgo", "data", "verify", folder))


def verify(
    folder: FolderArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Check a data folder against its manifest.

    Token shards: finds any altered byte, and missing or foreign files. Images: checks names and sizes of extracted
    images, and every byte of packed and decoded images and of archives.
    """
    from dataclasses import asdict

    from pipelines.data.images.manifest import holds_images
    from pipelines.data.verify import verify as verify_folder
    from pipelines.errors import AsgoError

    if holds_images(folder):
        _verify_images(folder, as_json)
        return
    progress = _BytesProgress()
    with progress.bar:
        results = verify_folder(folder, progress.show)
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
            f"{folder}: {len(bad)} of {len(results)} shards are bad, the first is {bad[0]}; copy the bad shards again, "
            "remove files that are not in the manifest, or make the folder again"
        )
    console.suggest_next(command("asgo", "train", "gpt", "--data", folder))


def _verify_images(folder: Path, as_json: bool) -> None:
    from dataclasses import asdict

    from pipelines.data.images.verify import verify_images
    from pipelines.errors import AsgoError

    progress = PhaseProgress()
    with progress.bar:
        problems = verify_images(folder, progress.show)
    if as_json:
        console.show_json([asdict(problem) for problem in problems])
    else:
        for problem in problems:
            console.data.print(_visible(f"{problem.file}: {problem.problem}"), markup=False, soft_wrap=True)
    if problems:
        raise AsgoError(
            f"{folder}: {_count(len(problems), 'problem')}, the first with {problems[0].file}; remove files that do "
            "not belong there, or make the folder again with --overwrite"
        )
    console.say(f"{folder}: good")
    _suggest_training(folder)


def summarize(manifest: Manifest, out: Path) -> None:
    """Show the result, and warn of documents that were not plain text."""
    rows = []
    for part, shards in (("training", manifest.shards[1:]), ("validation", manifest.shards[:1])):
        tokens, documents = (sum(getattr(shard, what) for shard in shards) for what in ("tokens", "documents"))
        rows.append((part, f"{len(shards):,}", f"{documents:,}", f"{tokens:,}"))
    console.show_table(("part", "shards", "documents", "tokens"), rows, title=str(out))
    for line in _odd_documents(manifest.documents):
        console.warn(f"of {manifest.documents.read:,} documents {line}")


def _as_json(found: FolderInfo) -> dict[str, Any]:
    manifest = found.manifest.model_dump(mode="json")
    shards = [{**shard, "bytes": size} for shard, size in zip(manifest["shards"], found.sizes, strict=True)]
    beginnings = {"training": found.training, "validation": found.validation}
    return {**manifest, "vocab_size": found.vocab_size, "shards": shards, "beginnings": beginnings}


def _facts(found: FolderInfo) -> Iterator[tuple[str, str]]:
    manifest = found.manifest
    yield "source", manifest.source
    yield "revision", manifest.revision
    if manifest.recipe:
        yield "recipe", ", ".join(f"{name} {value}" for name, value in manifest.recipe.items())
    yield "tokenizer", f"{manifest.tokenizer['name']}, vocabulary of {found.vocab_size:,}"
    yield "training", _total(manifest.shards[1:])
    yield "validation", _total(manifest.shards[:1])
    yield "documents", _met(manifest.documents)
    yield "shards end", _place(manifest.shards[-1].next_start)
    yield "on disk", decimal(sum(size or 0 for size in found.sizes))


def _total(shards: Sequence[ShardEntry]) -> str:
    tokens, documents = (sum(getattr(shard, what) for shard in shards) for what in ("tokens", "documents"))
    return f"{tokens:,} tokens, {_count(documents, 'document')}, {_count(len(shards), 'shard')}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _met(documents: DocumentCounts) -> str:
    """Describe the documents of the source."""
    return f"{documents.read:,} read, {', '.join(_odd_documents(documents)) or 'all plain text'}"


def _odd_documents(documents: DocumentCounts) -> list[str]:
    kinds = {
        "empty": "empty and skipped",
        "not_text": "not text and skipped",
        "repaired": "not valid Unicode and repaired",
        "literal_end_of_text": 'with a literal "<|endoftext|>", kept as text',
    }
    return [f"{count:,} {kind}" for name, kind in kinds.items() if (count := getattr(documents, name))]


def _place(position: SourcePosition) -> str:
    """Describe the position in the source after the last shard. Documents count from 0, as in the manifest."""
    if position.token:
        return f"in document {position.document:,} of the source, after {position.token:,} of its tokens"
    return f"before document {position.document:,} of the source"


def _show_lines(part: str, texts: Sequence[str]) -> None:
    """Print the beginnings of documents, each on one line of the terminal."""
    from rich.text import Text

    for number, text in enumerate(texts):
        line = Text.assemble((f"{'' if number else part:<13}", "bold"), _visible(text))
        console.data.print(line, no_wrap=True, overflow="ellipsis")


def _visible(text: str) -> str:
    """Return `text` as one line, with control characters escaped, so it cannot control the terminal."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


class _BytesProgress(WorkProgress):
    """Progress bar of the bytes checked."""

    def __init__(self) -> None:
        super().__init__(DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())

    def show(self, done: int, total: int) -> None:
        """Update the bar."""
        self._show("checking", done, total, f"checking: {decimal(done)} of {decimal(total)}")
