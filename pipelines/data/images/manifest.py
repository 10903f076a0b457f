"""Metadata of a folder of images: `manifest.json` when it is complete, `unfinished.json` until then."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError

from pipelines import shell
from pipelines.data.manifest import MANIFEST, UNFINISHED, Frozen, Sha256, sealed_json
from pipelines.errors import AsgoError, UsageError
from pipelines.storage import parse_json, write_atomically

Layout = Literal["extracted", "packed", "auto"]
"""The layout to make. "auto" is decoded for small images of one size, else packed."""
ImageShape = tuple[PositiveInt, PositiveInt, Literal[1, 3]]
"""(height, width, channels)."""
Recipe = Mapping[str, str]

_KINDS = ("images", "imagenet")
SOURCE = "SOURCE"
"""Key of a recipe for the argument of a command; the other keys are its options. A flag has the value ""."""
_DEFAULTS = {"images": {"layout": "auto"}, "imagenet": {"source": "archives", "layout": "extracted"}}
"""Options that a command line may omit, by command."""


LAYOUT_OPTIONS = {"extracted": "--extract", "packed": "--no-extract"}


class SourceFile(Frozen):
    """A source file. `modified_ns` shows whether it has changed since its digest was checked."""

    file: str
    bytes: NonNegativeInt
    digest: Annotated[str, Field(pattern=r"^(md5:[0-9a-f]{32}|sha256:[0-9a-f]{64})$")]
    modified_ns: int


class Piece(Frozen):
    """The part of a packed file that comes from one source file."""

    split: str
    bytes: NonNegativeInt
    sha256: Sha256


class ClassEntry(Frozen):
    """A class, and its numbers of images."""

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
    """A complete data set: files in `train/<class id>` and `val/<class id>`, or "packed", one file per split.

    A packed split is either a source file, given in `containers`, which is read in place and must stay in
    `source_folder`; or a copy of the images, described by `pieces`. "decoded" is one file per split with the pixels of
    all images, uint8 of `image_shape` (height, width, channels), one after another and described by `pieces`.
    `revision` is the commit of the source, if known.
    `train_index` and `validation_index` are the SHA-256 of the index files. `fingerprint` depends only on the images
    and labels, not on the source, and on the layout only in that decoded images have another.
    """

    layout: Literal["extracted", "packed", "decoded"]
    image_shape: Annotated[ImageShape | None, Field(strict=False)] = None
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
        """Class ids in the order of the labels."""
        return [each.id for each in self.classes]


class Unfinished(_Made):
    """State of an unfinished folder: the checked source files, and whether its old content is removed."""

    cleared: bool = False
    source_files: Annotated[tuple[SourceFile, ...], Field(strict=False)] = ()


def write_image_manifest(folder: Path, manifest: ImageManifest) -> None:
    """Write `manifest.json` into `folder`. Call it after everything else is on the disk: it marks completion."""
    write_atomically(folder / MANIFEST, sealed_json(manifest.model_dump(mode="json")))


def load_image_manifest(folder: Path) -> ImageManifest:
    """Return the manifest of `folder`.

    Raises `UsageError` if the folder does not exist, and `AsgoError` if it is unfinished (with the command that
    resumes), holds other data, was made by an earlier version, or its manifest was altered.
    """
    if folder.is_file():
        raise UsageError(f"{folder}: a file; if it is an archive of images, import it with: {_import_command(folder)}")
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such data folder")
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        unfinished = load_unfinished(folder)
        if unfinished is not None:
            raise AsgoError(f"{folder}: incomplete; resume with: {command(folder, unfinished)}") from None
        raise AsgoError(
            f"{folder}: no {MANIFEST}, so `asgo data` did not make this folder; if it holds images, make one from it "
            f"with: {_import_command(folder)}"
        ) from None
    try:
        fields = parse_json(raw)
        if fields.get("kind") not in _KINDS:
            raise AsgoError(f"{folder}: the data is not images")
        fields.pop("manifest_sha256", None)
        manifest = ImageManifest.model_validate(_current(path, fields))
    except (ValidationError, ValueError, AttributeError, KeyError, TypeError):
        raise AsgoError(f"{path}: damaged; make the folder again") from None
    if raw != sealed_json(fields):
        raise AsgoError(f"{path}: altered since it was written (its own checksum does not match); make it again")
    return manifest


def holds_images(folder: Path) -> bool:
    """Whether a folder's manifest or state says that it holds images; does not check the rest of the folder."""
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
    """Replace the state of `folder` atomically."""
    write_atomically(folder / UNFINISHED, state.model_dump_json(indent=2).encode())


def load_unfinished(folder: Path) -> Unfinished | None:
    """Return the state of an unfinished `folder`, or None. Raises `AsgoError` for other data or an old format."""
    path = folder / UNFINISHED
    try:
        return Unfinished.model_validate(_current(path, parse_json(path.read_bytes())))
    except FileNotFoundError:
        return None
    except (ValidationError, ValueError, AttributeError, KeyError, TypeError):
        raise AsgoError(f"{path}: damaged, or not for images; choose another folder, or remove this one") from None


def command(folder: Path, made: _Made) -> str:
    """Return the command line that makes `folder` with the same options."""
    defaults = _DEFAULTS.get(made.importer, {})
    options = {name: value for name, value in made.recipe.items() if defaults.get(name) != value}
    layout = [LAYOUT_OPTIONS[options.pop("layout")]] if "layout" in options else []
    source = [Path(options.pop(SOURCE))] if SOURCE in options else []
    words = [word for name, value in options.items() for word in (f"--{name}", *([Path(value)] if value else []))]
    return shell.command("asgo", "data", made.importer, *source, *words, "--out", folder, *layout)


def _import_command(folder: Path) -> str:
    """Return the command that imports a plain folder of images, or an archive of one."""
    whole = folder.resolve()
    out = Path("data", whole.name.partition(".")[0] or whole.name)
    if out.resolve().is_relative_to(whole):
        out = whole.with_name(f"{whole.name}-images")
    return shell.command("asgo", "data", "images", folder, "--out", out)


def _current(path: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """Convert the fields of a manifest or state to the current version. Version 2 was only for ImageNet."""
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
