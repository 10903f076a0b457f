import gzip
import json
import math
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from pipelines.data import text_to_shards
from pipelines.data.manifest import load_manifest, write_manifest
from pipelines.data.text_to_shards import TextSource, prepare_documents, prepare_text, split_documents
from pipelines.data.tokenizers import build_tokenizer
from pipelines.data.verify import verify
from pipelines.errors import AsgoError, UsageError


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def pieces_of(folder: Path, *files: str) -> list[str]:
    """The texts between end-of-text tokens, read by `struct` and not by the code under test."""
    manifest = load_manifest(folder)
    tokenizer = build_tokenizer(manifest.tokenizer)
    raw = b"".join((folder / file).read_bytes()[1024:] for file in files)
    tokens = np.array(struct.unpack(f"<{len(raw) // 2}H", raw))
    starts = np.flatnonzero(tokens == tokenizer.end_of_text)
    assert starts[0] == 0
    return [tokenizer.decode(part[1:]) for part in np.split(tokens, starts[1:])]


def sides_of(folder: Path) -> tuple[list[str], list[str]]:
    """Training and validation texts."""
    first, *rest = [shard.file for shard in load_manifest(folder).shards]
    return pieces_of(folder, *rest), pieces_of(folder, first)


def documents(count: int) -> list[str]:
    """Documents of many lengths, no line of which is in another one."""
    return ["".join(f"{number}.{line} é😀\r\n" for line in range(1 + number * 7 % 13)) for number in range(count)]


def write_rows(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.mark.parametrize("tokenizer", ["gpt2", "bytes", "chars"])
@pytest.mark.parametrize("val_fraction", [0.0001, 0.1, 0.37, 0.9])
def test_the_split_is_exact_and_nothing_is_on_both_sides(tmp_path: Path, tokenizer: str, val_fraction: float):
    texts = documents(60)
    path = write_rows(tmp_path / "a.jsonl", texts)
    prepare_text([path], tmp_path / "out", tokenizer=tokenizer, val_fraction=val_fraction, shard_tokens=97)
    training, validation = sides_of(tmp_path / "out")
    total = sum(map(len, texts))
    assert sum(map(len, validation)) == math.ceil(round(total * val_fraction, 6))
    assert sum(map(len, training)) + sum(map(len, validation)) == total
    whole = set(training) & set(texts) | set(validation) & set(texts)
    assert not set(training) & set(validation)
    (cut,) = set(texts) - whole or {""}
    heads, tails = set(training) - whole, set(validation) - whole
    assert "".join(heads) + "".join(tails) == cut


def test_the_seed_decides_which_documents_validate_and_order_is_kept(tmp_path: Path):
    texts = documents(60)
    path = write_rows(tmp_path / "a.jsonl", texts)
    chosen = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepare_text([path], tmp_path / name, tokenizer="bytes", val_fraction=0.2, seed=seed)
        training, validation = sides_of(tmp_path / name)
        assert [text for text in texts if text in training] == [text for text in training if text in texts]
        chosen.append(validation)
    assert chosen[0] == chosen[1] != chosen[2]
    assert (tmp_path / "a/manifest.json").read_bytes() == (tmp_path / "b/manifest.json").read_bytes()


def test_one_document_is_split_into_head_and_tail(tmp_path: Path):
    text = "".join(documents(20))
    (tmp_path / "a.txt").write_bytes(text.encode())
    prepare_text([tmp_path / "a.txt"], tmp_path / "out", tokenizer="chars", val_fraction=0.1)
    training, validation = sides_of(tmp_path / "out")
    cut = len(text) - math.ceil(len(text) / 10)
    assert (training, validation) == ([text[:cut]], [text[cut:]])


def test_the_fraction_is_the_decimal_that_was_typed():
    heads = split_documents(np.array([100]), 0.07, seed=0)  # 100 * 0.07 is 7.000000000000001 in binary
    assert heads.tolist() == [93]


def test_documents_drawn_whole_are_not_cut():
    lengths = np.array([10] * 10)
    heads = split_documents(lengths, 0.3, seed=5)
    assert sorted(heads.tolist()) == [0] * 3 + [10] * 7


def test_shards_hold_the_stream_that_one_shard_would(tmp_path: Path):
    path = write_rows(tmp_path / "a.jsonl", documents(80))
    for name, shard_tokens in (("one", 10**6), ("many", 100)):
        prepare_text([path], tmp_path / name, tokenizer="gpt2", val_fraction=0.1, shard_tokens=shard_tokens)
    manifest = load_manifest(tmp_path / "many")
    assert len(manifest.shards) > 10
    assert {shard.tokens for shard in manifest.shards[1:-1]} == {100}
    assert sides_of(tmp_path / "many") == sides_of(tmp_path / "one")
    assert all(result.problem is None for result in verify(tmp_path / "many"))


def test_the_manifest_says_where_in_the_source_each_shard_starts(tmp_path: Path):
    texts = documents(80)
    texts[3] = texts[11] = ""
    path = write_rows(tmp_path / "a.jsonl", texts)
    manifest = prepare_text([path], tmp_path / "out", tokenizer="bytes", val_fraction=0.1, shard_tokens=100)
    assert manifest == load_manifest(tmp_path / "out")
    assert manifest.documents.empty == 2
    for shard, following in zip(manifest.shards, manifest.shards[1:], strict=False):
        start = shard.next_start
        raw = (tmp_path / "out" / following.file).read_bytes()[1024:]
        first = struct.unpack("<H", raw[:2])[0]
        if start.token == 0:
            assert first == 256
        else:
            assert first == texts[start.document].encode()[start.token - 1]
    training, validation = sides_of(tmp_path / "out")
    assert sum(shard.documents for shard in manifest.shards[1:]) == len(training)
    assert manifest.shards[0].documents == len(validation)


def test_training_starts_at_the_first_document_that_trains(tmp_path: Path):
    texts = [f"document {number}" for number in range(6)]
    starts = set()
    for seed in range(5):
        out = tmp_path / str(seed)
        manifest = prepare_documents(
            TextSource("text", lambda: texts), out, tokenizer="bytes", val_fraction=0.5, seed=seed
        )
        start = manifest.shards[0].next_start
        assert (texts[start.document], start.token) == (sides_of(out)[0][0], 0)
        starts.add(start.document)
    assert len(starts) > 1


def test_every_kind_of_file_gives_the_same_shards(tmp_path: Path):
    texts = documents(30)
    lines = write_rows(tmp_path / "a.jsonl", texts)
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    table = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": texts, "id": range(30)}), table, row_group_size=7)
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number:03}.txt").write_bytes(text.encode())
    made = [
        prepare_text([path], tmp_path / f"out{index}", tokenizer="gpt2", val_fraction=0.1)
        for index, path in enumerate([lines, packed, table, folder])
    ]
    assert len({tuple(shard.sha256 for shard in manifest.shards) for manifest in made}) == 1
    assert len({manifest.revision for manifest in made}) == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"val_fraction": 0.0}, "--val-fraction must lie between 0 and 1, not 0.0"),
        ({"val_fraction": 1.0}, "--val-fraction must lie between 0 and 1, not 1.0"),
        ({"val_fraction": math.nan}, "--val-fraction must lie between 0 and 1, not nan"),
        ({"shard_tokens": 0}, "--shard-tokens must lie between 1 and 2,147,483,647, not 0"),
        ({"shard_tokens": 2**31}, "--shard-tokens must lie between 1 and 2,147,483,647, not 2,147,483,648"),
    ],
)
def test_impossible_options_are_refused(tmp_path: Path, options: dict[str, float], expected: str):
    (tmp_path / "a.txt").write_text("some text")
    with pytest.raises(UsageError, match=expected):
        prepare_text([tmp_path / "a.txt"], tmp_path / "out", **{"tokenizer": "bytes", "val_fraction": 0.5, **options})
    assert names_in(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", r"a\.txt: contains no text"),
        (b" \r\n\t", r"a\.txt: contains no text"),
        (b"x", "1 characters of text are too few to split"),
        (b"text\xff", r"a\.txt: byte 4 \(0xff\) is not valid UTF-8"),
    ],
)
def test_unusable_text_is_refused_before_anything_is_written(tmp_path: Path, content: bytes, expected: str):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(AsgoError, match=expected):
        prepare_text([tmp_path / "a.txt"], tmp_path / "out", tokenizer="gpt2", val_fraction=0.1)
    assert names_in(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(
    "second",
    [
        ["one", "two"],
        ["one", "two", "three", "four"],
        ["one", "two!", "three"],
        ["one", "tow", "three"],
        ["onet", "wo", "three"],
    ],
)
def test_text_that_changes_between_the_passes_is_refused(tmp_path: Path, second: list[str]):
    passes: Iterator[list[str]] = iter([["one", "two", "three"], second])
    source = TextSource("moving.txt", lambda: next(passes))
    with pytest.raises(AsgoError, match=r"moving\.txt: the text changed while it was being read"):
        prepare_documents(source, tmp_path / "out", tokenizer="bytes", val_fraction=0.5)
    assert not any(tmp_path.iterdir())


def test_an_existing_folder_is_left_alone_without_overwrite(tmp_path: Path):
    (tmp_path / "a.txt").write_text("some text " * 20)
    options = {"inputs": [tmp_path / "a.txt"], "tokenizer": "bytes", "val_fraction": 0.1}
    prepare_text(out=tmp_path / "out", **options)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "a.txt").write_text("other text " * 20)
    with pytest.raises(UsageError, match=r"out: this folder is not empty; .* pass --overwrite"):
        prepare_text(out=tmp_path / "out", **options)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    prepare_text(out=tmp_path / "out", overwrite=True, **options)
    assert "".join(map("".join, sides_of(tmp_path / "out"))) == "other text " * 20
    assert names_in(tmp_path) == ["a.txt", "out"]


def test_overwrite_deletes_nothing_but_token_shards(tmp_path: Path):
    (tmp_path / "a.txt").write_text("some text " * 20)
    options = {"inputs": [tmp_path / "a.txt"], "tokenizer": "bytes", "val_fraction": 0.1, "overwrite": True}
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"thesis: not a folder of token shards"):
        prepare_text(out=tmp_path / "thesis", **options)
    (tmp_path / "thesis" / "manifest.json").write_text('{"name": "a web page"}')
    with pytest.raises(AsgoError, match=r"manifest\.json: damaged, or not a manifest of token shards"):
        prepare_text(out=tmp_path / "thesis", **options)
    prepare_text(out=tmp_path / "out", **options)
    (tmp_path / "out" / "notes.md").write_text("mine")
    with pytest.raises(UsageError, match=r"out: it also holds notes\.md, so it is not overwritten"):
        prepare_text(out=tmp_path / "out", **options)
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "years of work"
    assert (tmp_path / "out" / "notes.md").read_text() == "mine"


def test_a_failure_while_overwriting_keeps_the_old_folder(tmp_path: Path):
    options = {"tokenizer": "bytes", "val_fraction": 0.5, "overwrite": True}
    prepare_documents(TextSource("old", lambda: ["old text"]), tmp_path / "out", **options)
    passes = iter([["new text"], ["changed!"]])
    with pytest.raises(AsgoError, match="changed"):
        prepare_documents(TextSource("new", lambda: next(passes)), tmp_path / "out", **options)
    assert load_manifest(tmp_path / "out").source == "old"
    assert names_in(tmp_path) == ["out"]


def test_a_file_in_the_way_is_refused_and_an_empty_folder_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = TextSource("text", lambda: ["some text"])
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="file: a file is in the way"):
        prepare_documents(source, tmp_path / "file", tokenizer="bytes", val_fraction=0.5, overwrite=True)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    prepare_documents(source, Path(), tokenizer="bytes", val_fraction=0.5)
    assert sum(shard.tokens for shard in load_manifest(tmp_path / "empty").shards[1:]) == 5


def test_the_revision_tells_other_documents_of_the_same_text_apart(tmp_path: Path):
    revisions = {
        prepare_documents(
            TextSource("text", lambda texts=texts: texts), tmp_path / str(index), tokenizer="bytes", val_fraction=0.5
        ).revision
        for index, texts in enumerate([["ab", "c"], ["a", "bc"], ["abc"]])
    }
    assert len(revisions) == 3


def test_the_manifest_of_many_inputs_stays_short(tmp_path: Path):
    paths = [tmp_path / f"{number}.py" for number in range(50)]
    for path in paths:
        path.write_text("text of " + path.name)
    manifest = prepare_text(paths, tmp_path / "out", tokenizer="bytes", val_fraction=0.5)
    assert manifest.source == f"{paths[0]}, {paths[1]}, {paths[2]} and 47 more"


def test_progress_goes_through_both_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text_to_shards, "_BATCH_CHARACTERS", 5)
    told: list[tuple[str, int, int | None]] = []
    prepare_documents(
        TextSource("text", lambda: ["ab", "cde", "fghi", "jk"]),
        tmp_path / "out",
        tokenizer="bytes",
        val_fraction=0.5,
        progress=lambda phase, done, total: told.append((phase, done, total)),
    )
    assert told == [
        ("reading", 5, None),
        ("reading", 11, None),
        ("writing", 0, 11),
        ("writing", 5, 11),
        ("writing", 11, 11),
    ]


def test_a_full_disk_is_named_and_nothing_stays(small_disk: Callable[[str], Path]):
    disk = small_disk("size=256k")
    with pytest.raises(OSError, match="No space left on device") as caught:
        prepare_documents(TextSource("t", lambda: ["x" * 10**6]), disk / "out", tokenizer="bytes", val_fraction=0.1)
    assert str(disk) in caught.value.filename
    assert not any(disk.iterdir())


def test_a_disk_that_fills_up_while_overwriting_keeps_the_old_folder(small_disk: Callable[[str], Path]):
    disk = small_disk("size=512k")
    options = {"tokenizer": "bytes", "val_fraction": 0.5, "overwrite": True}
    prepare_documents(TextSource("old", lambda: ["x" * 50_000]), disk / "out", **options)
    with pytest.raises(OSError, match="No space left on device"):
        prepare_documents(TextSource("new", lambda: ["x" * 400_000]), disk / "out", **options)
    assert all(result.problem is None for result in verify(disk / "out"))
    assert names_in(disk) == ["out"]


def test_a_read_only_disk_is_named(small_disk: Callable[[str], Path]):
    disk = small_disk("ro,size=64k")
    with pytest.raises(OSError, match="Read-only file system") as caught:
        prepare_documents(TextSource("t", lambda: ["text"]), disk / "out", tokenizer="bytes", val_fraction=0.5)
    assert str(disk) in caught.value.filename
    assert not any(disk.iterdir())


def test_a_manifest_of_other_shards_does_not_open_the_way_for_overwrite(tmp_path: Path):
    source = TextSource("text", lambda: ["some text"])
    prepare_documents(source, tmp_path / "a", tokenizer="bytes", val_fraction=0.5)
    (tmp_path / "b").mkdir()
    write_manifest(tmp_path / "b", load_manifest(tmp_path / "a"))
    (tmp_path / "b" / "shard_000009.bin").write_bytes(b"of somebody else")
    with pytest.raises(UsageError, match=r"it also holds shard_000009\.bin"):
        prepare_documents(source, tmp_path / "b", tokenizer="bytes", val_fraction=0.5, overwrite=True)


@pytest.mark.parametrize("tokenizer", ["gpt2", "bytes", "chars"])
def test_a_long_text_in_pieces_gives_the_shards_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: str
):
    (tmp_path / "a.txt").write_text("".join(documents(60)), newline="")
    write_rows(tmp_path / "b.jsonl", ["".join(documents(30)), "<|endoftext|>", "x"])
    made = []
    for piece, batch in ((1 << 20, 1 << 22), (64, 200)):
        monkeypatch.setattr("pipelines.data.documents.PIECE_BYTES", piece)
        monkeypatch.setattr(text_to_shards, "_BATCH_CHARACTERS", batch)
        for seed in range(3):
            out = tmp_path / f"{piece}-{seed}"
            inputs = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
            options = {"tokenizer": tokenizer, "val_fraction": 0.3, "shard_tokens": 300, "seed": seed}
            made.append(prepare_text(inputs, out, **options))
    assert made[:3] == made[3:]
    assert made[0].documents.literal_end_of_text == 1


def test_a_literal_end_of_text_is_counted_once_and_across_pieces(tmp_path: Path):
    source = TextSource("text", lambda: [iter(["a<|endof", "text|> and ", "<|endoftext|>"]), "b"])
    manifest = prepare_documents(source, tmp_path / "out", tokenizer="bytes", val_fraction=0.1)
    assert (manifest.documents.read, manifest.documents.literal_end_of_text) == (2, 1)


def test_a_second_preparation_of_a_folder_is_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path):
    options = {"tokenizer": "bytes", "val_fraction": 0.5}

    def read() -> list[str]:
        with pytest.raises(UsageError, match="out: another process is preparing data in this folder"):
            prepare_documents(TextSource("second", lambda: ["text"]), tmp_path / "out", **options)
        prepare_documents(TextSource("other", lambda: ["text"]), tmp_path / "other", **options, overwrite=True)
        return ["some text"]

    (tmp_path / ".out.lock").touch()  # as a killed process leaves it
    for overwrite in (False, True):
        prepare_documents(TextSource("first", read), tmp_path / "out", **options, overwrite=overwrite)
        shutil.rmtree(tmp_path / "other")
    assert load_manifest(tmp_path / "out").source == "first"
    assert names_in(tmp_path) == ["out"]


def test_an_own_folder_in_a_parent_that_is_not_is_written_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """No name beside an empty folder is touched; what a kill leaves in it is cleared by the next preparation."""
    out = tmp_path / "mine"
    out.mkdir()
    identity = out.stat().st_ino
    source = TextSource("text", lambda: ["some text"])
    options = {"tokenizer": "bytes", "val_fraction": 0.5}
    with monkeypatch.context() as patch:
        patch.setattr(text_to_shards, "write_manifest", _dies)
        patch.setattr("pipelines.data.destination.clear", lambda folder: None)  # it is killed, and clears nothing up
        with pytest.raises(KeyboardInterrupt):
            prepare_documents(source, out, **options)
    assert names_in(out) == ["shard_000000.bin", "shard_000001.bin", "unfinished.json"]
    with pytest.raises(AsgoError, match="unfinished; run the command that started it again to resume"):
        load_manifest(out)
    assert prepare_documents(source, out, **options) == load_manifest(out)
    assert out.stat().st_ino == identity
    assert names_in(out) == ["manifest.json", "shard_000000.bin", "shard_000001.bin"]
    assert names_in(tmp_path) == ["mine"]


def test_a_failure_in_place_leaves_the_folder_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.setattr(text_to_shards, "write_manifest", _dies)
    with pytest.raises(KeyboardInterrupt):
        prepare_documents(TextSource("t", lambda: ["text"]), tmp_path / "mine", tokenizer="bytes", val_fraction=0.5)
    assert names_in(tmp_path / "mine") == []


def test_a_mount_point_is_written_to_and_not_overwritten(small_disk: Callable[[str], Path]):
    disk = small_disk("size=1m")
    source = TextSource("text", lambda: ["some text"])
    prepare_documents(source, disk, tokenizer="bytes", val_fraction=0.5)
    assert all(result.problem is None for result in verify(disk))
    with pytest.raises(UsageError, match="cannot be replaced as a whole, because it is a mount point; empty it first"):
        prepare_documents(source, disk, tokenizer="bytes", val_fraction=0.5, overwrite=True)
    assert all(result.problem is None for result in verify(disk))


def test_a_link_is_written_through(tmp_path: Path):
    (tmp_path / "big").mkdir()
    (tmp_path / "out").symlink_to("big/data")
    for overwrite in (False, True):
        source = TextSource("text", lambda: ["some text"])
        prepare_documents(source, tmp_path / "out", tokenizer="bytes", val_fraction=0.5, overwrite=overwrite)
    assert (tmp_path / "out").is_symlink()
    assert names_in(tmp_path / "big") == ["data"]


def test_overwrite_deletes_nothing_that_came_while_it_worked(tmp_path: Path):
    options = {"tokenizer": "bytes", "val_fraction": 0.5, "overwrite": True}
    prepare_documents(TextSource("old", lambda: ["old text"]), tmp_path / "out", **options)

    def read() -> list[str]:
        (tmp_path / "out" / "notes.md").write_text("mine")
        return ["new text"]

    passes = iter([lambda: ["new text"], read])
    with pytest.raises(UsageError, match=r"it also holds notes\.md"):
        prepare_documents(TextSource("new", lambda: next(passes)()), tmp_path / "out", **options)
    assert (tmp_path / "out" / "notes.md").read_text() == "mine"
    assert load_manifest(tmp_path / "out").source == "old"


def test_files_are_counted_and_what_is_left_out_is_named(tmp_path: Path):
    (tmp_path / "in").mkdir()
    for name in ("a.txt", "b.txt", "c.pdf", "d.pdf", ".hidden"):
        (tmp_path / "in" / name).write_text("some text")
    told: list[str] = []
    prepare_text([tmp_path / "in"], tmp_path / "out", tokenizer="bytes", val_fraction=0.5, notify=told.append)
    assert told == ["reading 2 files; skipped: 2 ending in .pdf, 1 hidden"]


def _dies(*_: object) -> None:
    raise KeyboardInterrupt
