import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.data.verify import ShardResult, verify
from pipelines.errors import AsgoError, UsageError


@pytest.fixture
def folder(make_folder: Callable[..., Path]) -> Path:
    return make_folder(range(500), range(1000), range(1000, 1300))


def flip(path: Path, place: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def bad(folder: Path) -> dict[str, str]:
    return {result.file: result.problem for result in verify(folder) if result.problem}


def test_a_folder_as_it_was_written_is_good(folder: Path):
    assert verify(folder) == [
        ShardResult("shard_000000.bin", 500, 1, None),
        ShardResult("shard_000001.bin", 1000, 1, None),
        ShardResult("shard_000002.bin", 300, 1, None),
    ]


@pytest.mark.parametrize("file", ["shard_000000.bin", "shard_000001.bin", "shard_000002.bin"])
def test_any_flipped_bit_of_a_shard_is_found(folder: Path, file: str):
    size = (folder / file).stat().st_size
    generator = random.Random(file)
    places = [0, 4, 8, 12, 1023, 1024, size // 2, size - 1, *(generator.randrange(size) for _ in range(30))]
    for place in places:
        bit = generator.randrange(8)
        flip(folder / file, place, bit)
        assert list(bad(folder)) == [file], f"byte {place}, bit {bit}"
        flip(folder / file, place, bit)
    assert bad(folder) == {}


def test_any_flipped_bit_of_the_manifest_is_found(folder: Path):
    path = folder / "manifest.json"
    generator = random.Random(0)
    for place in range(0, path.stat().st_size, 7):
        bit = generator.randrange(8)
        flip(path, place, bit)
        with pytest.raises(AsgoError, match=r"manifest\.json"):
            verify(folder)
        flip(path, place, bit)
    assert bad(folder) == {}


def test_truncated_missing_and_extra_shards_are_found(folder: Path):
    shutil.copy(folder / "shard_000001.bin", folder / "shard_000003.bin")
    (folder / "shard_000001.bin").write_bytes((folder / "shard_000001.bin").read_bytes()[:-2])
    (folder / "shard_000002.bin").unlink()
    found = bad(folder)
    assert "truncated" in found["shard_000001.bin"]
    assert found["shard_000002.bin"] == "missing"
    assert found["shard_000003.bin"] == "not in the manifest"
    assert len(found) == 3


def test_shards_that_changed_places_are_found(make_folder: Callable[..., Path]):
    folder = make_folder([1, 2], [3, 4], [5, 6])
    (folder / "shard_000001.bin").rename(folder / "kept")
    (folder / "shard_000002.bin").rename(folder / "shard_000001.bin")
    (folder / "kept").rename(folder / "shard_000002.bin")
    assert set(bad(folder)) == {"shard_000001.bin", "shard_000002.bin"}


def test_a_folder_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(UsageError, match="nowhere: no such data folder"):
        verify(tmp_path / "nowhere")
