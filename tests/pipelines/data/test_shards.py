import hashlib
import struct
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from pipelines.data.manifest import SourcePosition, shard_name
from pipelines.data.shards import ShardWriter, WriterState, open_shard
from pipelines.errors import AsgoError


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(folder: Path, documents: list[list[int]], shard_tokens: int) -> list:
    files = (folder / shard_name(index) for index in range(1, 100))
    with ShardWriter(files, shard_tokens=shard_tokens) as writer:
        for index, tokens in enumerate(documents):
            write_document(writer, tokens, index)
        return writer.finish()


def write_document(writer: ShardWriter, tokens: list[int], number: int) -> int:
    return writer.write(np.array(tokens, dtype=np.uint16), np.array([0]), np.array([number]))


def parse(path: Path) -> tuple[tuple[int, ...], list[int]]:
    content = path.read_bytes()
    header = struct.unpack("<256i", content[:1024])
    return header, list(struct.unpack(f"<{(len(content) - 1024) // 2}H", content[1024:]))


def test_header_and_tokens_are_the_bytes_that_the_ecosystem_reads(tmp_path: Path):
    write(tmp_path, [[50256, 1, 258, 65535]], shard_tokens=100)
    header, tokens = parse(tmp_path / "shard_000001.bin")
    assert header == (20240520, 1, 4, *[0] * 253)
    assert tokens == [50256, 1, 258, 65535]


def test_documents_go_on_in_the_next_shard_and_every_cut_is_exact(tmp_path: Path):
    documents = [[9] + [n] * size for n, size in enumerate([3, 0, 11, 2, 1, 30])]
    entries = write(tmp_path, documents, shard_tokens=7)
    stream = list(chain(*documents))
    shards = [parse(tmp_path / entry.file) for entry in entries]
    assert [len(tokens) for _, tokens in shards] == [7] * (len(stream) // 7) + [len(stream) % 7]
    assert list(chain(*(tokens for _, tokens in shards))) == stream
    for entry, (header, tokens) in zip(entries, shards, strict=True):
        assert header[2] == entry.tokens == len(tokens)
        assert entry.documents == tokens.count(9)
        assert entry.sha256 == hashlib.sha256((tmp_path / entry.file).read_bytes()).hexdigest()


def test_the_next_start_is_where_the_next_shard_really_starts(tmp_path: Path):
    documents = [[9] + [n] * size for n, size in enumerate([3, 0, 11, 2, 1, 30])]
    entries = write(tmp_path, documents, shard_tokens=7)
    stream = list(chain(*documents))
    read = 0
    for entry in entries:
        read += entry.tokens
        before = sum(len(document) for document in documents[: entry.next_start.document])
        assert before + entry.next_start.token == read
        assert entry.next_start.document == len(documents) or entry.next_start.token < len(
            documents[entry.next_start.document]
        )
    assert read == len(stream)


def test_a_stream_that_ends_with_a_shard_leaves_no_empty_one(tmp_path: Path):
    entries = write(tmp_path, [[9] * 14], shard_tokens=7)
    assert [entry.tokens for entry in entries] == [7, 7]
    assert names_in(tmp_path) == ["shard_000001.bin", "shard_000002.bin"]


def test_nothing_is_taken_when_the_files_have_run_out(tmp_path: Path):
    with ShardWriter([tmp_path / "one.bin"], shard_tokens=4) as writer:
        assert write_document(writer, [9, 1, 2, 3, 4], 0) == 4
        assert write_document(writer, [9, 1], 1) == 0
        (entry,) = writer.finish()
    assert (entry.tokens, entry.next_start) == (4, SourcePosition(document=0, token=4))


def test_a_writer_that_does_not_finish_leaves_no_shard(tmp_path: Path):
    with ShardWriter([tmp_path / "one.bin"], shard_tokens=4) as writer:
        write_document(writer, [9, 1, 2], 0)
    assert names_in(tmp_path) == [".one.bin.partial"]


@pytest.mark.parametrize("seed", range(20))
def test_many_documents_at_once_and_a_stop_anywhere_change_no_byte(tmp_path: Path, seed: int):
    """Batches of documents, checkpoints, and work after them that is lost and done again."""
    rng = np.random.default_rng(seed)
    documents = [[9, *rng.integers(0, 8, rng.integers(0, 40)).tolist()] for _ in range(60)]
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    expected = write(tmp_path / "whole", documents, shard_tokens=50)
    files = [tmp_path / "parts" / shard_name(index) for index in range(1, 100)]
    done, state = 0, WriterState()
    while True:
        with ShardWriter(files, shard_tokens=50, state=state) as writer:
            for _ in range(rng.integers(1, 4)):
                done = write_batch(writer, documents, done, int(rng.integers(1, 6)))
            state = WriterState.model_validate_json(writer.checkpoint().model_dump_json())
            lost = write_batch(writer, documents, done, int(rng.integers(0, 20)))
            if lost == len(documents) and rng.random() < 0.7:
                writer.finish()  # and then killed before it could tell
        if done == len(documents):
            break
    with ShardWriter(files, shard_tokens=50, state=state) as writer:
        assert writer.finish() == expected
    for entry in expected:
        assert (tmp_path / "parts" / entry.file).read_bytes() == (tmp_path / "whole" / entry.file).read_bytes()
    assert names_in(tmp_path / "parts") == names_in(tmp_path / "whole")


def write_batch(writer: ShardWriter, documents: list[list[int]], first: int, count: int) -> int:
    batch = documents[first : first + count]
    if batch:
        lengths = np.array([len(document) for document in batch])
        tokens = np.array(list(chain(*batch)), dtype=np.uint16)
        numbers = np.arange(first, first + len(batch))
        assert writer.write(tokens, np.cumsum(lengths) - lengths, numbers) == len(tokens)
    return first + len(batch)


@pytest.mark.parametrize("damage", ["finished", "open"])
def test_a_writer_does_not_go_on_from_what_has_changed(tmp_path: Path, damage: str):
    files = [tmp_path / "one.bin", tmp_path / "two.bin"]
    with ShardWriter(files, shard_tokens=4) as writer:
        write_document(writer, [9, 1, 2, 3, 4, 5], 0)
        state = writer.checkpoint()
    if damage == "finished":
        (tmp_path / "one.bin").write_bytes(b"")
    else:
        path = tmp_path / ".two.bin.partial"
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(AsgoError, match="pass --overwrite to start again"):
        ShardWriter(files, shard_tokens=4, state=state)


def test_tokens_come_back_whole_and_from_any_place(tmp_path: Path):
    tokens = np.random.default_rng(0).integers(0, 50257, 3000, dtype=np.uint16)
    write(tmp_path, [tokens.tolist()], shard_tokens=3000)
    shard = open_shard(tmp_path / "shard_000001.bin", 50257)
    assert len(shard) == 3000
    np.testing.assert_array_equal(shard.read(), tokens)
    some = np.empty(70, dtype=np.uint16)
    shard.read_into(some, 1234)
    np.testing.assert_array_equal(some, tokens[1234:1304])


def test_a_document_may_come_in_parts(tmp_path: Path):
    """The bytes and the places are those of the document written at once, whatever the parts."""
    documents = [[9] + [n] * size for n, size in enumerate([3, 0, 11, 2, 1, 30])]
    (tmp_path / "whole").mkdir()
    expected = write(tmp_path / "whole", documents, shard_tokens=7)
    for size in (1, 2, 3, 7, 14):
        folder = tmp_path / str(size)
        folder.mkdir()
        with ShardWriter((folder / shard_name(index) for index in range(1, 100)), shard_tokens=7) as writer:
            for number, tokens in enumerate(documents):
                for start in range(0, len(tokens), size):
                    part = np.array(tokens[start : start + size], dtype=np.uint16)
                    ends = start + size >= len(tokens)
                    writer.write(part, np.array([-start]), np.array([number]), complete=ends)
            assert writer.finish() == expected


def test_a_planted_link_is_not_written_through(tmp_path: Path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".shard_000001.bin.partial").symlink_to(tmp_path / "precious")
    write(tmp_path / "out", [[9, 1]], shard_tokens=2)
    assert (tmp_path / "precious").read_text() == "mine"
    assert parse(tmp_path / "out" / "shard_000001.bin")[1] == [9, 1]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda raw: raw[:1000], "truncated: 1,000 bytes are less than the header's 1,024"),
        (lambda raw: b"", "truncated: 0 bytes"),
        (lambda raw: raw[:-1], "1,043 bytes, but the header and 10 tokens take 1,044"),
        (lambda raw: raw + b"\0\0", "1,046 bytes, but the header and 10 tokens"),
        (lambda raw: b"\0\0\0\0" + raw[4:], "not a token shard: it starts with 0, not 20240520"),
        (lambda raw: raw[:4] + struct.pack("<i", 2) + raw[8:], "token shard of version 2; only version 1"),
        (lambda raw: raw[:8] + struct.pack("<i", -1) + raw[12:], "the header claims -1 tokens"),
        (lambda raw: raw[:8] + struct.pack("<i", 0) + raw[12:1024], "the header claims 0 tokens"),
        (lambda raw: raw[:-2] + struct.pack("<H", 257), "token 257 is beyond the vocabulary of 257"),
    ],
)
def test_a_shard_that_is_not_as_it_should_be_is_refused(
    tmp_path: Path, damage: Callable[[bytes], bytes], expected: str
):
    write(tmp_path, [list(range(10))], shard_tokens=10)
    path = tmp_path / "shard_000001.bin"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(AsgoError) as caught:
        open_shard(path, 257)
    message = str(caught.value)
    assert expected in message
    assert message.startswith(f"{path}: ")
    assert "make the folder again" in message


def test_the_largest_token_of_the_vocabulary_is_accepted(tmp_path: Path):
    write(tmp_path, [[0, 256]], shard_tokens=10)
    assert open_shard(tmp_path / "shard_000001.bin", 257).read()[1] == 256
