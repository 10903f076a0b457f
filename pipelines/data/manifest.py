"""`manifest.json`: what a folder of token shards holds and where it came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from pipelines.errors import AsgoError, UsageError
from pipelines.storage import parse_json, write_atomically

MANIFEST = "manifest.json"
UNFINISHED = "unfinished.json"
"""Stands in for the manifest as long as a resumable command has not finished the folder."""

_REMAKE = "remove the folder and make it again"


def shard_name(index: int) -> str:
    """File name of a shard; 0 validates, the others train."""
    return f"shard_{index:06d}.bin"


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Frozen(BaseModel):
    """Plain facts as JSON: unknown keys and other types are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class SourcePosition(Frozen):
    """A place in the source: a document's number, and how many of its tokens (end-of-text included) come before."""

    document: NonNegativeInt
    token: NonNegativeInt


class ShardEntry(Frozen):
    """One shard file. `documents` counts those that start in it, `next_start` is where the next shard starts."""

    file: str
    sha256: Sha256
    tokens: PositiveInt
    documents: NonNegativeInt
    next_start: SourcePosition


class DocumentCounts(Frozen):
    """What was met in the source: every row or file, and among them those that are not plain text.

    `empty` (blank counts too) and `not_text` ones were left out. Of `repaired` ones each lone surrogate or invalid
    byte became U+FFFD. A literal "<|endoftext|>" is ordinary text, and `literal_end_of_text` counts who holds one.
    """

    read: NonNegativeInt = 0
    empty: NonNegativeInt = 0
    not_text: NonNegativeInt = 0
    repaired: NonNegativeInt = 0
    literal_end_of_text: NonNegativeInt = 0

    def __add__(self, other: DocumentCounts) -> DocumentCounts:
        sums = {name: getattr(self, name) + getattr(other, name) for name in DocumentCounts.model_fields}
        return DocumentCounts(**sums)


class Manifest(Frozen):
    """A folder of shards: the first one validates, the rest train.

    `tokenizer` is what `build_tokenizer` takes. `revision` says which state of the source this is; of text files
    it is the digest of their documents. `recipe` holds the options of a command that can tell by them that its work
    is done already; it is empty for others.
    """

    format_version: Literal[2] = 2
    source: str
    revision: str
    recipe: dict[str, str | int] = {}
    tokenizer: dict[str, str]
    documents: DocumentCounts
    shards: Annotated[tuple[ShardEntry, ...], Field(min_length=2, strict=False)]

    @model_validator(mode="after")
    def _files_are_in_order(self) -> Manifest:
        for index, shard in enumerate(self.shards):
            if shard.file != shard_name(index):
                raise ValueError(f"shard {index} must be the file {shard_name(index)}, not {shard.file}")
        return self


def fingerprint(manifest: Manifest) -> str:
    """SHA-256 over the shards' digests and the tokenizer: equal for equal data, wherever the folder lies."""
    content = [manifest.tokenizer, [shard.sha256 for shard in manifest.shards]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` into `folder`; to be called when all shards are there."""
    write_atomically(folder / MANIFEST, sealed_json(manifest.model_dump(mode="json")))


def load_manifest(folder: Path) -> Manifest:
    """The manifest of `folder`.

    Raises `UsageError` when there is no such folder, and `AsgoError` when the folder is unfinished, or its manifest
    missing, malformed, or not as it was written.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such data folder")
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        if (folder / UNFINISHED).exists():
            raise AsgoError(f"{folder}: unfinished; the command that began it, given again, goes on") from None
        raise AsgoError(f"{folder}: no {MANIFEST}, so this is not a folder of token shards") from None
    try:
        fields = parse_json(raw)
        del fields["manifest_sha256"]
        manifest = Manifest.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise AsgoError(f"{path}: {place + ': ' if place else ''}{first['msg']}; {_REMAKE}") from None
    except (ValueError, TypeError, KeyError):
        raise AsgoError(f"{path}: damaged, or not a manifest of token shards; {_REMAKE}") from None
    if raw != sealed_json(manifest.model_dump(mode="json")):
        raise AsgoError(f"{path}: altered since it was written (its own checksum does not match); {_REMAKE}")
    return manifest


def sealed_json(fields: Mapping[str, Any]) -> bytes:
    """JSON text with a checksum of itself: an altered alphabet would change every text without any other sign."""
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**fields, "manifest_sha256": digest}, indent=2) + "\n").encode()
