"""Does a data folder still hold what was written?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipelines.data.manifest import ShardEntry, load_manifest
from pipelines.data.shards import shard_problem
from pipelines.data.tokenizers import build_tokenizer
from pipelines.errors import UsageError
from pipelines.storage import sha256_of


@dataclass(frozen=True)
class ShardResult:
    """One shard file as the manifest has it, and what is wrong with it, if anything."""

    file: str
    tokens: int
    documents: int
    problem: str | None


def verify(folder: Path) -> list[ShardResult]:
    """Check each shard of `folder` against the manifest: header, size, largest token, digest, presence.

    A shard that the manifest does not know is a problem too. Raises `AsgoError` when the manifest itself is missing
    or was altered, `UsageError` when there is no such folder.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such data folder")
    manifest = load_manifest(folder)
    vocab_size = build_tokenizer(manifest.tokenizer).vocab_size
    results = [
        ShardResult(shard.file, shard.tokens, shard.documents, _problem(folder, shard, vocab_size))
        for shard in manifest.shards
    ]
    known = {shard.file for shard in manifest.shards}
    extra = sorted(path.name for path in folder.glob("*.bin") if path.name not in known)
    return results + [ShardResult(name, 0, 0, "not in the manifest") for name in extra]


def _problem(folder: Path, shard: ShardEntry, vocab_size: int) -> str | None:
    path = folder / shard.file
    if not path.exists():
        return "missing"
    problem = shard_problem(path, vocab_size)
    if problem is None and sha256_of(path) != shard.sha256:
        return "altered: its SHA-256 is not the one in the manifest"
    return problem
