"""Folders of token shards made from known tokens, and small disks that can be full or read-only."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from pipelines.data.manifest import DocumentCounts, Manifest, shard_name, write_manifest
from pipelines.data.shards import ShardWriter

MakeFolder = Callable[..., Path]


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Makes a data folder with exactly these tokens in its shards, the validation shard first."""

    def make(*shards: Sequence[int], tokenizer: str = "gpt2", name: str = "tokens") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        entries = []
        for index, tokens in enumerate(shards):
            with ShardWriter([folder / shard_name(index)], shard_tokens=max(1, len(tokens))) as writer:
                writer.write(np.asarray(tokens, dtype=np.uint16), np.array([0]), np.array([index]))
                entries += writer.finish()
        manifest = Manifest(
            source="made by hand",
            revision="1",
            tokenizer={"name": tokenizer},
            documents=DocumentCounts(),
            shards=tuple(entries),
        )
        write_manifest(folder, manifest)
        return folder

    return make


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system in memory with the given options."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        point = tmp_path / f"disk{len(mounted)}"
        point.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(point)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("this system has no mount command")
        if done.returncode:
            pytest.skip(f"mounting a small disk is not permitted here: {done.stderr.strip()}")
        mounted.append(point)
        return point

    yield mount
    for point in mounted:
        subprocess.run(["umount", "-l", str(point)], check=False)
