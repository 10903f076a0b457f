"""What a folder of images holds: `manifest.json` when it is complete, and `unfinished.json` until then."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, ValidationError

from pipelines import shell
from pipelines.data.manifest import MANIFEST, UNFINISHED, Frozen, Sha256, sealed_json
from pipelines.errors import AsgoError, UsageError
from pipelines.storage import parse_json, write_atomically

Layout = Literal["extracted", "packed"]
Recipe = Mapping[str, str]

_KINDS = ("images", "imagenet")
_DEFAULTS = {"source": "archives", "layout": "extracted"}
"""What a command line leaves out."""


class SourceFile(Frozen):
    """A file that the images came in: `modified_ns` tells whether it is still the one whose digest was checked."""

    file: str
    bytes: NonNegativeInt
    digest: Annotated[str, Field(pattern=r"^(md5:[0-9a-f]{32}|sha256:[0-9a-f]{64})$")]
    modified_ns: int


class Piece(Frozen):
    """The part of a packed file that came from one source file."""

    split: str
    bytes: NonNegativeInt
    sha256: Sha256


class ClassEntry(Frozen):
    """A class, and how many images of it there are."""

    id: str
    name: str
    train: NonNegativeInt
    validation: NonNegativeInt


class _Made(Frozen):
    """How a folder was made: the data set's name, the subcommand of `asgo data`, and its options."""

    format_version: Literal[3] = 3
    kind: Literal["images"] = "images"
    dataset: str
    importer: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")]
    recipe: dict[str, str]


class ImageManifest(_Made):
    """A complete data set: files in `train/<class id>` and `val/<class id>`, or "packed", one file a split.

    That file is one of the source files where `containers` names it, by split; it is read in place and must stay in
    `source_folder`. Otherwise it is a copy of the images, in `pieces`. `revision` is the commit of the source, if
    known. `train_index` and `validation_index` are the SHA-256 of the index files. `fingerprint` is equal for equal
    images and labels, whatever the source and the layout.
    """

    layout: Layout
    revision: str | None
    source_folder: str
    source_files: Annotated[tuple[SourceFile, ...], Field(strict=False)]
    containers: dict[str, str] = Field(default_factory=dict)
    pieces: Annotated[tuple[Piece, ...], Field(strict=False)] = ()
    train_index: Sha256
    validation_index: Sha256
    fingerprint: Sha256
    classes: Annotated[tuple[ClassEntry, ...], Field(min_length=1, strict=False)]

    @property
    def class_ids(self) -> list[str]:
        """In the order of the labels."""
        return [each.id for each in self.classes]


class Unfinished(_Made):
    """A folder in the making: from which source files, and whether its old content is gone."""

    cleared: bool = False
    source_files: Annotated[tuple[SourceFile, ...], Field(strict=False)] = ()


def write_image_manifest(folder: Path, manifest: ImageManifest) -> None:
    """Write `manifest.json` into `folder`; to be called when everything else is on the disk."""
    write_atomically(folder / MANIFEST, sealed_json(manifest.model_dump(mode="json")))


def load_image_manifest(folder: Path) -> ImageManifest:
    """The manifest of `folder`.

    Raises `UsageError` when there is no such folder, and `AsgoError` when it is unfinished (with the command that
    resumes), holds something else, was made by an earlier version, or its manifest is not as it was written.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such data folder")
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        unfinished = load_unfinished(folder)
        if unfinished is not None:
            raise AsgoError(f"{folder}: incomplete; this goes on: {command(folder, unfinished)}") from None
        raise AsgoError(
            f"{folder}: no {MANIFEST}, so `asgo data imagenet` has not made this folder; "
            "make one from the archives of ImageNet, or from the hub's copy: a plain folder of images cannot be taken"
        ) from None
    try:
        fields = parse_json(raw)
        if fields.get("kind") not in _KINDS:
            raise AsgoError(f"{folder}: holds other data than images")
        fields.pop("manifest_sha256", None)
        manifest = ImageManifest.model_validate(_current(path, fields))
    except (ValidationError, ValueError, AttributeError, KeyError, TypeError):
        raise AsgoError(f"{path}: damaged; make the folder again") from None
    if raw != sealed_json(fields):
        raise AsgoError(f"{path}: altered since it was written (its own checksum does not match); make it again")
    return manifest


def holds_images(folder: Path) -> bool:
    """Whether a folder says that it holds images, finished or not, readable or not."""
    for name in (MANIFEST, UNFINISHED):
        try:
            fields = parse_json((folder / name).read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            continue
        except ValueError:
            return False
        return isinstance(fields, dict) and fields.get("kind") in _KINDS
    return False


def save_unfinished(folder: Path, state: Unfinished) -> None:
    """Replace the state of `folder` as a whole."""
    write_atomically(folder / UNFINISHED, state.model_dump_json(indent=2).encode())


def load_unfinished(folder: Path) -> Unfinished | None:
    """The state of an unfinished `folder`, if it has one. Raises `AsgoError` for other data, or an old format."""
    path = folder / UNFINISHED
    try:
        return Unfinished.model_validate(_current(path, parse_json(path.read_bytes())))
    except FileNotFoundError:
        return None
    except (ValidationError, ValueError, AttributeError, KeyError, TypeError):
        raise AsgoError(f"{path}: damaged, or not of images; choose another folder, or remove this one") from None


def command(folder: Path, made: _Made) -> str:
    """The command line that makes `folder` in the same way."""
    options = {name: value for name, value in made.recipe.items() if _DEFAULTS.get(name) != value}
    packed = ["--no-extract"] if options.pop("layout", None) else []
    words = [word for name, value in options.items() for word in (f"--{name}", Path(value))]
    return shell.command("asgo", "data", made.importer, *words, "--out", folder, *packed)


def _current(path: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a manifest or a state as the current version names them; version 2 was ImageNet's alone."""
    if (fields.get("kind"), fields.get("format_version")) == ("imagenet", 1):
        raise AsgoError(f"{path}: made by an earlier version of asgo; make the folder again with --overwrite")
    if (fields.get("kind"), fields.get("format_version")) != ("imagenet", 2):
        return fields
    new = {**fields, "format_version": 3, "kind": "images", "dataset": "ImageNet", "importer": "imagenet"}
    new["source_files"] = new.pop("archives", ())
    if "archives_folder" not in new:
        return new
    origin, folder, layout = new.pop("origin"), new.pop("archives_folder"), new["layout"]
    new |= {"source_folder": folder, "recipe": {"source": origin, "archives": folder, "layout": layout}}
    new["classes"] = [
        {"id" if key == "wnid" else key: value for key, value in entry.items()} for entry in new["classes"]
    ]
    if (origin, layout) == ("archives", "packed"):
        new["containers"] = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
    return new
