"""What a folder of ImageNet holds: `manifest.json` when it is whole, and `unfinished.json` until then."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, ValidationError

from pipelines.data.manifest import MANIFEST, UNFINISHED, Frozen, Sha256, sealed_json
from pipelines.errors import AsgoError, UsageError
from pipelines.storage import write_atomically

Layout = Literal["extracted", "archives"]
Recipe = Mapping[str, str]


class CheckedArchive(Frozen):
    """An archive with the right MD5; `modified_ns` tells whether the file is still the one that was checked."""

    file: str
    bytes: NonNegativeInt
    md5: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    modified_ns: int


class ClassEntry(Frozen):
    """A class, and how many images of it there are."""

    wnid: str
    name: str
    train: NonNegativeInt
    validation: NonNegativeInt


class ImagenetManifest(Frozen):
    """A whole ImageNet: files in `train/<wnid>` and `val/<wnid>`, or the places of all images in the archives.

    `archives_folder` is where the archives were, and for the layout "archives" still must be. `train_index` and
    `validation_index` are the SHA-256 of the index files. `fingerprint` is equal for equal images and labels, in
    either layout.
    """

    format_version: Literal[1] = 1
    kind: Literal["imagenet"] = "imagenet"
    layout: Layout
    archives_folder: str
    archives: Annotated[tuple[CheckedArchive, ...], Field(strict=False)]
    train_index: Sha256
    validation_index: Sha256
    fingerprint: Sha256
    classes: Annotated[tuple[ClassEntry, ...], Field(min_length=1, strict=False)]

    @property
    def recipe(self) -> Recipe:
        """The options it was made with."""
        return {"archives": self.archives_folder, "layout": self.layout}


class Unfinished(Frozen):
    """A folder that is being made: with which options, from which archives, and whether its old content is gone."""

    format_version: Literal[1] = 1
    kind: Literal["imagenet"] = "imagenet"
    recipe: dict[str, str]
    cleared: bool = False
    archives: Annotated[tuple[CheckedArchive, ...], Field(strict=False)] = ()


def write_imagenet_manifest(folder: Path, manifest: ImagenetManifest) -> None:
    """Write `manifest.json` into `folder`; to be called when everything else is on the disk."""
    write_atomically(folder / MANIFEST, sealed_json(manifest))


def load_imagenet_manifest(folder: Path) -> ImagenetManifest:
    """The manifest of `folder`.

    Raises `UsageError` when there is no such folder, and `AsgoError` when it is unfinished (with the command that goes
    on), holds something else, or its manifest is not as it was written.
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
        raise AsgoError(f"{folder}: no {MANIFEST}, so `asgo data imagenet` has not made this folder") from None
    try:
        fields = json.loads(raw)
        if fields.get("kind") != "imagenet":
            raise AsgoError(f"{folder}: holds other data than ImageNet")
        del fields["manifest_sha256"]
        manifest = ImagenetManifest.model_validate(fields)
    except (ValidationError, ValueError, AttributeError, KeyError):
        raise AsgoError(f"{path}: damaged; make the folder again") from None
    if raw != sealed_json(manifest):
        raise AsgoError(f"{path}: altered since it was written (its own checksum does not match); make it again")
    return manifest


def save_unfinished(folder: Path, state: Unfinished) -> None:
    """Replace the state of `folder` as a whole."""
    write_atomically(folder / UNFINISHED, state.model_dump_json(indent=2).encode())


def load_unfinished(folder: Path) -> Unfinished | None:
    """The state of an unfinished `folder`, if it has one. Raises `AsgoError` when it is not one of ImageNet."""
    path = folder / UNFINISHED
    try:
        return Unfinished.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError:
        raise AsgoError(f"{path}: damaged, or not of ImageNet; choose another folder, or remove this one") from None


def command(folder: Path, recipe: Recipe) -> str:
    """The command line that makes `folder` with these options."""
    words = ["asgo", "data", "imagenet", "--archives", recipe.get("archives", ""), "--out", str(folder)]
    return shlex.join([*words, "--no-extract"] if recipe.get("layout") == "archives" else words)
