"""What a folder of ImageNet holds: `manifest.json` when it is whole, and `unfinished.json` until then."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, ValidationError

from pipelines import shell
from pipelines.data.manifest import MANIFEST, UNFINISHED, Frozen, Sha256, sealed_json
from pipelines.errors import AsgoError, UsageError
from pipelines.storage import parse_json, write_atomically

Origin = Literal["archives", "hub"]
Layout = Literal["extracted", "packed"]
Recipe = Mapping[str, str]


class CheckedArchive(Frozen):
    """A file that the images came in: `modified_ns` tells whether it is still the one whose digest was checked.

    The digest is the MD5 of ImageNet's own archives, and the SHA-256 of the hub's Parquet files.
    """

    file: str
    bytes: NonNegativeInt
    digest: Annotated[str, Field(pattern=r"^(md5:[0-9a-f]{32}|sha256:[0-9a-f]{64})$")]
    modified_ns: int


class Piece(Frozen):
    """What came of one of the hub's files in the file that a split's pictures were copied to, one after another."""

    split: str
    bytes: NonNegativeInt
    sha256: Sha256


class ClassEntry(Frozen):
    """A class, and how many images of it there are."""

    wnid: str
    name: str
    train: NonNegativeInt
    validation: NonNegativeInt


class ImagenetManifest(Frozen):
    """A whole ImageNet: files in `train/<wnid>` and `val/<wnid>`, or "packed", all of a split in one file.

    That file is the archive, read in place, or a copy of the pictures of the hub's files, in `pieces`.
    `archives_folder` is where the archives were, and where ImageNet's own still must be when they are read in place.
    `revision` is the hub's commit, where it is known. `train_index` and `validation_index` are the SHA-256 of the index
    files. `fingerprint` is equal for equal images and labels, whatever the origin and the layout.
    """

    format_version: Literal[2] = 2
    kind: Literal["imagenet"] = "imagenet"
    origin: Origin
    layout: Layout
    archives_folder: str
    revision: str | None
    archives: Annotated[tuple[CheckedArchive, ...], Field(strict=False)]
    pieces: Annotated[tuple[Piece, ...], Field(strict=False)] = ()
    train_index: Sha256
    validation_index: Sha256
    fingerprint: Sha256
    classes: Annotated[tuple[ClassEntry, ...], Field(min_length=1, strict=False)]

    @property
    def recipe(self) -> Recipe:
        """The options it was made with."""
        return make_recipe(self.origin, self.archives_folder, self.layout)


class Unfinished(Frozen):
    """A folder that is being made: with which options, from which archives, and whether its old content is gone."""

    format_version: Literal[2] = 2
    kind: Literal["imagenet"] = "imagenet"
    recipe: dict[str, str]
    cleared: bool = False
    archives: Annotated[tuple[CheckedArchive, ...], Field(strict=False)] = ()


def make_recipe(origin: Origin, archives_folder: str, layout: Layout) -> Recipe:
    """The options that decide what a folder holds."""
    return {"source": origin, "archives": archives_folder, "layout": layout}


def write_imagenet_manifest(folder: Path, manifest: ImagenetManifest) -> None:
    """Write `manifest.json` into `folder`; to be called when everything else is on the disk."""
    write_atomically(folder / MANIFEST, sealed_json(manifest))


def load_imagenet_manifest(folder: Path) -> ImagenetManifest:
    """The manifest of `folder`.

    Raises `UsageError` when there is no such folder, and `AsgoError` when it is unfinished (with the command that goes
    on), holds something else, was made by an earlier version, or its manifest is not as it was written.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such data folder")
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        unfinished = load_unfinished(folder)
        if unfinished is not None:
            raise AsgoError(f"{folder}: incomplete; this goes on: {command(folder, unfinished.recipe)}") from None
        raise AsgoError(
            f"{folder}: no {MANIFEST}, so `asgo data imagenet` has not made this folder; "
            "make one from the archives of ImageNet, or from the hub's copy: a plain folder of images cannot be taken"
        ) from None
    try:
        fields = parse_json(raw)
        if fields.get("kind") != "imagenet":
            raise AsgoError(f"{folder}: holds other data than ImageNet")
        _require_version(path, fields)
        del fields["manifest_sha256"]
        manifest = ImagenetManifest.model_validate(fields)
    except (ValidationError, ValueError, AttributeError, KeyError):
        raise AsgoError(f"{path}: damaged; make the folder again") from None
    if raw != sealed_json(manifest):
        raise AsgoError(f"{path}: altered since it was written (its own checksum does not match); make it again")
    return manifest


def holds_imagenet(folder: Path) -> bool:
    """Whether a folder says that it is ImageNet, finished or not, readable or not."""
    for name in (MANIFEST, UNFINISHED):
        try:
            fields = parse_json((folder / name).read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            continue
        except ValueError:
            return False
        return isinstance(fields, dict) and fields.get("kind") == "imagenet"
    return False


def save_unfinished(folder: Path, state: Unfinished) -> None:
    """Replace the state of `folder` as a whole."""
    write_atomically(folder / UNFINISHED, state.model_dump_json(indent=2).encode())


def load_unfinished(folder: Path) -> Unfinished | None:
    """The state of an unfinished `folder`, if it has one. Raises `AsgoError` when it is not ImageNet's, or too old."""
    path = folder / UNFINISHED
    try:
        fields = parse_json(path.read_bytes())
        _require_version(path, fields)
        return Unfinished.model_validate(fields)
    except FileNotFoundError:
        return None
    except (ValidationError, ValueError, AttributeError):
        raise AsgoError(f"{path}: damaged, or not of ImageNet; choose another folder, or remove this one") from None


def _require_version(path: Path, fields: Mapping[str, object]) -> None:
    if (fields.get("kind"), fields.get("format_version")) == ("imagenet", 1):
        raise AsgoError(f"{path}: made by an earlier version of asgo; make the folder again with --overwrite")


def command(folder: Path, recipe: Recipe) -> str:
    """The command line that makes `folder` with these options."""
    source = ["--source", "hub"] if recipe.get("source") == "hub" else []
    packed = ["--no-extract"] if recipe.get("layout") == "packed" else []
    archives = Path(recipe.get("archives", ""))
    return shell.command("asgo", "data", "imagenet", *source, "--archives", archives, "--out", folder, *packed)
