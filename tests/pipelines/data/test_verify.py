import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines.data import verify as module
from pipelines.data.manifest import SourcePosition, load_manifest, write_manifest
from pipelines.data.verify import ShardResult, verify
from pipelines.errors import AsgoError, UsageError
from pipelines.storage import sha256_of


@pytest.fixture
def folder(make_folder: Callable[..., Path]) -> Path:
    return make_folder(range(500), range(1000), range(1000, 1300))


def flip(path: Path, place: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        old = file.read(1)[0]
        file.seek(place)
        file.write(bytes([old ^ 1 << bit]))


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
    places = [0, 4, 8, 12, 1023, 1024, size // 2, size - 1, *(generator.randrange(size) for _ in range(100))]
    for place in places:
        bit = generator.randrange(8)
        flip(folder / file, place, bit)
        assert list(bad(folder)) == [file], f"byte {place}, bit {bit}"
        flip(folder / file, place, bit)
    assert bad(folder) == {}


def test_a_flipped_bit_is_found_on_either_side_of_where_the_reading_pauses(make_folder: Callable[..., Path]):
    tokens = np.full(module._BYTES_AT_ONCE + 1, 7)  # two readings and two bytes
    folder = make_folder(tokens, tokens)
    for place in (1023, 1024, *(1024 + pieces * module._BYTES_AT_ONCE + side for pieces in (1, 2) for side in (-1, 0))):
        flip(folder / "shard_000001.bin", place, 3)
        assert list(bad(folder)) == ["shard_000001.bin"], f"byte {place}"
        flip(folder / "shard_000001.bin", place, 3)
    assert bad(folder) == {}


def test_any_flipped_bit_of_the_manifest_is_found(folder: Path):
    path = folder / "manifest.json"
    generator = random.Random(0)
    for place in range(path.stat().st_size):
        bit = generator.randrange(8)
        flip(path, place, bit)
        with pytest.raises(AsgoError, match=r"manifest\.json"):
            verify(folder)
        flip(path, place, bit)
    assert bad(folder) == {}


def test_truncated_extended_missing_and_extra_shards_are_found(folder: Path):
    shutil.copy(folder / "shard_000001.bin", folder / "shard_000003.bin")
    os.truncate(folder / "shard_000000.bin", 1024 + 499 * 2 + 1)
    with (folder / "shard_000001.bin").open("ab") as file:
        file.write(b"\0")
    (folder / "shard_000002.bin").unlink()
    found = bad(folder)
    assert "truncated" in found["shard_000000.bin"]
    assert "3,025 bytes, but the header and 1,000 tokens take 3,024" in found["shard_000001.bin"]
    assert found["shard_000002.bin"] == "missing"
    assert found["shard_000003.bin"] == "not in the manifest"
    assert len(found) == 4


def test_shards_that_changed_places_are_found(make_folder: Callable[..., Path]):
    folder = make_folder([1, 2], [3, 4], [5, 6, 7])
    (folder / "shard_000001.bin").rename(folder / "kept")
    (folder / "shard_000002.bin").rename(folder / "shard_000001.bin")
    (folder / "kept").rename(folder / "shard_000002.bin")
    assert bad(folder) == {
        "shard_000001.bin": "another shard: 3 tokens",
        "shard_000002.bin": "another shard: 2 tokens",
    }


def test_what_an_interrupted_writer_left_is_named(folder: Path):
    (folder / ".shard_000001.bin.partial").write_bytes(b"half")
    assert list(bad(folder).items()) == [(".shard_000001.bin.partial", "left by an interrupted run; remove it")]


def test_a_token_beyond_the_vocabulary_is_found_though_the_digest_is_right(make_folder: Callable[..., Path]):
    folder = make_folder([1, 2, 3], [4, 256, 5], [257, 6], tokenizer="bytes")
    assert bad(folder) == {"shard_000002.bin": "token 257 is beyond the vocabulary of 257"}


def test_a_wrong_header_is_found_though_the_digest_is_right(folder: Path):
    flip(folder / "shard_000002.bin", 4, 1)
    manifest = load_manifest(folder)
    *others, last = manifest.shards
    last = last.model_copy(
        update={"sha256": sha256_of(folder / last.file), "next_start": SourcePosition(document=3, token=0)}
    )
    write_manifest(folder, manifest.model_copy(update={"shards": (*others, last)}))
    assert bad(folder) == {"shard_000002.bin": "token shard of version 3; only version 1 can be read"}


def test_a_shard_that_cannot_be_read_does_not_hide_the_others(folder: Path):
    (folder / "shard_000000.bin").unlink()
    (folder / "shard_000000.bin").mkdir()
    flip(folder / "shard_000002.bin", 1024, 0)
    found = bad(folder)
    assert found["shard_000000.bin"] == "cannot be read: Is a directory"
    assert "altered" in found["shard_000002.bin"]


def test_results_keep_the_order_of_the_manifest_whichever_shard_is_done_first(make_folder: Callable[..., Path]):
    folder = make_folder(range(50_000), *([number] for number in range(20)))
    assert [result.file for result in verify(folder)] == [f"shard_{number:06d}.bin" for number in range(21)]


def test_shards_are_checked_side_by_side(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    all_are_reading = threading.Barrier(3, timeout=60)
    read = module._read

    def wait_and_read(path: Path, tally: module.Tally) -> module._Content:
        all_are_reading.wait()
        return read(path, tally)

    monkeypatch.setattr(module, "_read", wait_and_read)
    assert bad(folder) == {}


def test_progress_ends_at_the_bytes_of_all_shards(folder: Path):
    shown: list[tuple[int, int]] = []
    verify(folder, lambda done, total: shown.append((done, total)))
    size = sum(path.stat().st_size for path in folder.glob("*.bin"))
    assert [done for done, _ in shown] == sorted({done for done, _ in shown})
    assert shown[-1] == (size, size)


def test_an_interrupted_check_stops_in_the_middle_of_a_shard(make_folder: Callable[..., Path]):
    folder = make_folder(*[np.full(10 * module._BYTES_AT_ONCE, 7)] * 2)
    calls = 0

    def interrupt(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.02)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever other tests' libraries have left
    try:
        with pytest.raises(KeyboardInterrupt):
            verify(folder, interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    assert calls < 10, "of 42 for the whole of both shards"


def test_a_folder_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(UsageError, match="nowhere: no such data folder"):
        verify(tmp_path / "nowhere")


def test_an_unfinished_folder_is_said_to_be_one(folder: Path):
    (folder / "unfinished.json").write_text("{}")
    assert bad(folder) == {}  # the manifest is written last: with it the folder is complete
    (folder / "manifest.json").unlink()
    with pytest.raises(AsgoError, match="unfinished; run the command that started it again to resume"):
        verify(folder)
