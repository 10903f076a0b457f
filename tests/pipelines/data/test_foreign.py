"""Token files that other programs made, written here byte by byte as those programs describe them."""

import hashlib
import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pipelines.config import RunConfig
from pipelines.data import foreign
from pipelines.data.batches import TrainingBatches, open_token_data
from pipelines.errors import AsgoError, UsageError
from pipelines.training.train import train
from tests.conftest import SilentReporter
from tests.pipelines.training.test_resume import Dies, assert_same_run, die_at

Make = Callable[..., RunConfig]
Files = dict[str, bytes]


def headerless(tokens: Sequence[int]) -> bytes:
    """nanoGPT: `np.uint16` tokens and nothing else."""
    return struct.pack(f"<{len(tokens)}H", *tokens)


def wide(tokens: Sequence[int], kind: str) -> bytes:
    """Tokens of another type, as `struct` calls it."""
    return struct.pack(f"<{len(tokens)}{kind}", *tokens)


def shard(tokens: Sequence[int], magic: int = 20240520, version: int = 1) -> bytes:
    """llm.c and modded-nanogpt: 256 int32, of which three are used, and then uint16 tokens."""
    return struct.pack("<256i", magic, version, len(tokens), *[0] * 253) + headerless(tokens)


LLAMA_3 = struct.pack("<256i", 20240801, 7, 3, *[0] * 253) + struct.pack("<3I", 128_000, 9906, 1917)
TRAIN = [[50256, *range(300 + number, 500 + number)] for number in range(3)]
VAL = [50256, *range(1000, 1100)]
MODDED_NANOGPT = {
    "fineweb_val_000000.bin": shard(VAL),
    **{f"fineweb_train_{number:06d}.bin": shard(tokens) for number, tokens in enumerate(TRAIN, start=1)},
}
NANOGPT = {"train.bin": headerless([*TRAIN[0], *TRAIN[1]]), "val.bin": headerless(VAL)}
LAYOUTS = {
    "modded-nanogpt": (MODDED_NANOGPT, TRAIN),
    "llm.c edu_fineweb": ({f"edu_{name}": content for name, content in MODDED_NANOGPT.items()}, TRAIN),
    "llm.c": ({"tiny_shakespeare_train.bin": shard(TRAIN[0]), "tiny_shakespeare_val.bin": shard(VAL)}, TRAIN[:1]),
    "llm.c, capitals": ({"TinyStories_train.bin": shard(TRAIN[0]), "TinyStories_val.bin": shard(VAL)}, TRAIN[:1]),
    "nanoGPT": (NANOGPT, [[*TRAIN[0], *TRAIN[1]]]),
    "headers under nanoGPT's names": ({"train.bin": shard(TRAIN[0]), "val.bin": shard(VAL)}, TRAIN[:1]),
}


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    def make(files: Files, name: str = "foreign") -> Path:
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file).write_bytes(content)
        return tmp_path / name

    return make


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_files_of_other_programs_are_read_as_they_are(make: Callable[..., Path], layout: str):
    files, expected = LAYOUTS[layout]
    data = open_token_data(make({**files, "input.txt": b"text", "prepare.py": b"import os", "test.bin": b"?"}))
    assert [part.read().tolist() for part in data.train] == expected
    assert [part.read().tolist() for part in data.validation] == [VAL]
    assert data.tokenizer == {"name": "gpt2"}
    assert data.vocab_size == 50_257


def test_files_follow_each_other_by_their_numbers_and_the_last_whole_word_says_what_they_are_for(
    make: Callable[..., Path],
):
    training = ["a_val_train_11.bin", "train_retrieval_2.bin", "train_retrieval_10.bin", "zoo-train.bin"]
    validating = ["medieval_train_val_9.bin", "medieval_val_010.bin"]
    files = {name: shard([number]) for number, name in enumerate([*training, *validating])}
    data = open_token_data(make(dict(reversed(files.items()))))
    assert [part.read().tolist() for part in data.train] == [[0], [1], [2], [3]]
    assert [part.read().tolist() for part in data.validation] == [[4], [5]]


def test_a_hundred_and_more_shards_are_read_in_the_order_of_their_numbers(make: Callable[..., Path]):
    training = {f"fineweb_train_{number}.bin": shard([number] * 9) for number in range(1, 104)}
    assert sorted(training) != list(training)
    data = open_token_data(make({**training, "fineweb_val_0.bin": shard(VAL)}))
    batches = TrainingBatches(data, context_length=4, batch_size=2, seed=0, order="sequential")
    read = [batches.batch(step)[0].unique().tolist() for step in range(104)]
    assert read == [*([number] for number in range(1, 104)), [1]]


@pytest.mark.parametrize(("layout", "order"), [("modded-nanogpt", "sequential"), ("nanoGPT", "shuffled")])
def test_a_run_on_them_trains_and_resumes_exactly(
    make: Callable[..., Path],
    layout: str,
    order: str,
    small_config: Make,
    tmp_path: Path,
    reporter: SilentReporter,
    monkeypatch: pytest.MonkeyPatch,
):
    config = small_config(data__folder=str(make(LAYOUTS[layout][0])), data__order=order, training__steps=4)
    rows = train(config, tmp_path / "whole", reporter)
    assert rows[-1]["loss"] < rows[0]["loss"]
    with monkeypatch.context() as patch:
        die_at(patch, step=3)
        with pytest.raises(Dies):
            train(config, tmp_path / "resumed", reporter)
    train(config, tmp_path / "resumed", reporter, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "resumed", step=4)


@pytest.mark.parametrize("layout", ["modded-nanogpt", "nanoGPT"])
def test_a_run_is_not_resumed_when_a_byte_has_changed(
    make: Callable[..., Path], layout: str, small_config: Make, tmp_path: Path, reporter: SilentReporter
):
    files, _ = LAYOUTS[layout]
    folder = make(files)
    config = small_config(data__folder=str(folder), training__steps=2)
    train(config, tmp_path / "run", reporter)
    for name, content in files.items():
        (folder / name).write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
        with pytest.raises(UsageError, match="was trained on other data"):
            train(config, tmp_path / "run", reporter, resume=True)
        (folder / name).write_bytes(content)
    train(config, tmp_path / "run", reporter, resume=True)


def test_the_fingerprint_depends_on_what_the_files_hold_and_in_which_order(make: Callable[..., Path]):
    def fingerprint(*names_and_files: tuple[str, bytes]) -> str:
        fingerprints.append(open_token_data(make(dict(names_and_files), name=str(len(fingerprints)))).fingerprint)
        return fingerprints[-1]

    fingerprints: list[str] = []
    one, two, three = (shard(tokens) for tokens in TRAIN)
    known = fingerprint(("val.bin", one), ("train_1.bin", two), ("train_2.bin", three))
    assert known == fingerprint(("x_val.bin", one), ("x_train_8.bin", two), ("x_train_9.bin", three))
    assert known != fingerprint(("val.bin", one), ("train_1.bin", three), ("train_2.bin", two))
    assert known != fingerprint(("val_1.bin", one), ("val_2.bin", two), ("train.bin", three))


def test_every_piece_of_a_large_file_is_checked_and_counts(make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(foreign, "_PIECE_BYTES", 100)
    monkeypatch.setattr(foreign, "_BYTES_AT_ONCE", 30)
    known = open_token_data(make(NANOGPT)).fingerprint
    val, whole = NANOGPT["val.bin"], NANOGPT["train.bin"]
    parts = ([hashlib.sha256(x[at : at + 100]).hexdigest() for at in range(0, len(x), 100)] for x in (val, whole))
    content = ["gpt2", *([part] for part in parts)]  # should it ever change, runs of before could not be resumed
    assert known == hashlib.sha256(json.dumps(content).encode()).hexdigest()
    for place in (0, 98, 100, 398, 400, len(whole) - 2):
        other = whole[:place] + struct.pack("<H", 50_255) + whole[place + 2 :]
        assert open_token_data(make({**NANOGPT, "train.bin": other}, name=f"other{place}")).fingerprint != known
        bad = whole[:place] + struct.pack("<H", 50_257) + whole[place + 2 :]
        with pytest.raises(AsgoError, match="beyond the vocabulary"):
            open_token_data(make({**NANOGPT, "train.bin": bad}, name=f"bad{place}"))


def without(name: str) -> Files:
    return {file: content for file, content in MODDED_NANOGPT.items() if name not in file}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 'no .bin file with the word "train" in its name, such as fineweb_train_000001.bin or train.bin'),
        (without("train"), 'no .bin file with the word "train" in its name'),
        (without("val"), 'no .bin file with the word "val" in its name, such as fineweb_val_000001.bin or val.bin'),
        ({**MODDED_NANOGPT, "fineweb_train_000002.bin": LLAMA_3}, "000002.bin: 32-bit Llama 3 tokens of llm.c"),
        ({**NANOGPT, "train.bin": LLAMA_3}, "train.bin: 32-bit Llama 3 tokens of llm.c"),
        ({**MODDED_NANOGPT, "fineweb_val_000000.bin": shard(VAL)[:-2]}, "1,224 bytes, but the header and 101 tokens"),
        ({**MODDED_NANOGPT, "fineweb_val_000000.bin": shard(VAL)[:700]}, "truncated: 700 bytes are less than"),
        ({**MODDED_NANOGPT, "fineweb_val_000000.bin": b""}, "truncated: 0 bytes"),
        ({**MODDED_NANOGPT, "fineweb_val_000000.bin": headerless(VAL * 9)}, "not a token shard: it starts with"),
        ({**MODDED_NANOGPT, "hellaswag_val.bin": shard(VAL, magic=20240522)}, "it starts with 20240522, not 20240520"),
        ({**MODDED_NANOGPT, "fineweb_val_000000.bin": shard(VAL, version=2)}, "token shard of version 2"),
        ({**MODDED_NANOGPT, "fineweb_train_000003.bin": shard([7, 50257])}, "token 50,257 is beyond the vocabulary"),
        ({**NANOGPT, "train.bin": headerless([50257, 7])}, "token 50,257 is beyond the vocabulary of 50,257 of GPT-2"),
        ({**NANOGPT, "val.bin": headerless(VAL)[:-1]}, "val.bin: 201 bytes are not a whole number of 16-bit tokens"),
        ({**NANOGPT, "train.bin": wide(TRAIN[0], "I")}, "train.bin: probably 32-bit or 64-bit tokens"),
        ({**NANOGPT, "train.bin": wide(TRAIN[0], "q")}, "train.bin: probably 32-bit or 64-bit tokens"),
        ({**NANOGPT, "val.bin": wide([100_257, *VAL], "I")}, "val.bin: probably 32-bit or 64-bit tokens"),
        ({**NANOGPT, "val.bin": b""}, "val.bin: it is empty"),
        ({**NANOGPT, "val.bin": shard(VAL)[:700]}, "val.bin: truncated: 700 bytes are less than the header"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_in_one_line(make: Callable[..., Path], files: Files, expected: str):
    folder = make(files)
    with pytest.raises(AsgoError) as caught:
        open_token_data(folder)
    assert expected in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_table_of_character_tokens_is_not_unpickled(make: Callable[..., Path], tmp_path: Path):
    trap = b"cos\nmkdir\n(V" + str(tmp_path / "sprung").encode() + b"\ntR."  # a pickle that makes a folder
    folder = make({"train.bin": headerless([1, 2, 3]), "val.bin": headerless([1, 2]), "meta.pkl": trap})
    with pytest.raises(AsgoError, match=r"meta\.pkl.*`asgo data shakespeare` or `asgo data text --tokenizer chars`"):
        open_token_data(folder)
    assert not (tmp_path / "sprung").exists()


def test_a_folder_that_asgo_has_not_finished_is_no_foreign_folder(make: Callable[..., Path]):
    with pytest.raises(AsgoError, match=r"unfinished; run the command that started it again to resume"):
        open_token_data(make({"unfinished.json": b"{}", "shard_000000.bin": shard(VAL), **MODDED_NANOGPT}))


def test_batches_of_foreign_files_are_windows_of_their_tokens(make: Callable[..., Path]):
    batches = TrainingBatches(open_token_data(make(NANOGPT)), context_length=40, batch_size=10, seed=0)
    stream = [*TRAIN[0], *TRAIN[1]]
    inputs, targets = batches.batch(0)
    assert sorted(inputs.tolist()) == sorted(stream[first : first + 40] for first in range(0, 400, 40))
    assert sorted(targets.tolist()) == sorted(stream[first + 1 : first + 41] for first in range(0, 400, 40))
