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
"""The journal of a folder that a command has not finished; the manifest replaces it."""

_REMAKE = "remove the folder and make it again"


def shard_name(index: int) -> str:
    """Return the file name of a shard: 0 is the validation shard, the others are training shards."""
    return f"shard_{index:06d}.bin"


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Frozen(BaseModel):
    """An immutable record stored as JSON; rejects unknown keys and other types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class SourcePosition(Frozen):
    """A position in the source: a document's number, and the number of its tokens before it (with end-of-text)."""

    document: NonNegativeInt
    token: NonNegativeInt


class ShardEntry(Frozen):
    """One shard file. `documents` counts the documents that start in it; the next shard starts at `next_start`."""

    file: str
    sha256: Sha256
    tokens: PositiveInt
    documents: NonNegativeInt
    next_start: SourcePosition


class DocumentCounts(Frozen):
    """Number of documents in the source: all rows or files (`read`), and the special ones among them.

    `empty` (or blank) and `not_text` documents are skipped. In `repaired` documents, each lone surrogate or invalid
    byte is replaced with U+FFFD. A literal "<|endoftext|>" is ordinary text; `literal_end_of_text` counts the documents
    that contain one.
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
    """A folder of shards: shard 0 for validation, the rest for training.

    `tokenizer` is the argument of `build_tokenizer`. `revision` is the version of the source; for text files, the
    digest of their documents. `recipe` holds the options of a resumable command, which compares them to see whether its
    work is done; it is empty for other commands.
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
    """Return the SHA-256 of the shards' digests and the tokenizer. It does not depend on the folder's path."""
    content = [manifest.tokenizer, [shard.sha256 for shard in manifest.shards]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` into `folder`. Call it after all shards are written: it marks the folder as complete."""
    write_atomically(folder / MANIFEST, sealed_json(manifest.model_dump(mode="json")))


def load_manifest(folder: Path) -> Manifest:
    """Return the manifest of `folder`.

    Raises `UsageError` if the folder does not exist, and `AsgoError` if it is unfinished, or its manifest is missing,
    malformed or altered.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such data folder")
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        if (folder / UNFINISHED).exists():
            raise AsgoError(f"{folder}: unfinished; run the command that started it again to resume") from None
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
    """Return JSON text with its own checksum. Without it, an altered alphabet would change all texts unnoticed."""
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**fields, "manifest_sha256": digest}, indent=2) + "\n").encode()
