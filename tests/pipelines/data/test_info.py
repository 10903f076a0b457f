import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.data.info import CHARACTERS, describe
from pipelines.data.manifest import load_manifest
from pipelines.data.tokenizers import BytesTokenizer, Gpt2Tokenizer
from pipelines.errors import AsgoError, UsageError


def shard(*documents: str) -> list[int]:
    """Tokens of whole documents, by bytes."""
    return [token for text in documents for token in (BytesTokenizer.end_of_text, *text.encode())]


@pytest.fixture
def bytes_folder(make_folder: Callable[..., Path]) -> Callable[..., Path]:
    return lambda *shards: make_folder(*shards, tokenizer="bytes")


def test_the_first_documents_are_decoded_each_up_to_its_end(bytes_folder: Callable[..., Path]):
    found = describe(bytes_folder(shard("held out", "too"), shard("one\n", "zwei ä", "three", "four")), lines=3)
    assert found.training == ("one\n", "zwei ä", "three")
    assert found.validation == ("held out",)
    assert found.vocab_size == 257


@pytest.mark.parametrize(("lines", "training", "validation"), [(0, 0, 0), (1, 1, 1), (9, 2, 1)])
def test_as_many_documents_are_decoded_as_were_asked_for(
    bytes_folder: Callable[..., Path], lines: int, training: int, validation: int
):
    found = describe(bytes_folder(shard("a", "b"), shard("c", "d"), shard("e")), lines)
    assert (len(found.training), len(found.validation)) == (training, validation)


def test_the_tail_of_an_earlier_document_is_passed_over(bytes_folder: Callable[..., Path]):
    folder = bytes_folder(shard("x"), [*b"the end of another", *shard("begins here", "and here")])
    assert describe(folder, lines=1).training == ("begins here",)


def test_a_shard_in_which_no_document_begins_shows_the_middle_of_one(bytes_folder: Callable[..., Path]):
    assert describe(bytes_folder(shard("x"), [*b"on and on"]), lines=3).training == ("on and on",)


def test_a_long_document_is_cut_between_characters(bytes_folder: Callable[..., Path]):
    found = describe(bytes_folder(shard("\U0001f40b" * 3000), shard("a" * 3000)), lines=1)
    assert found.training == ("a" * CHARACTERS,)
    assert found.validation == ("\U0001f40b" * CHARACTERS,)


def test_gpt2_text_is_decoded_with_its_own_table(make_folder: Callable[..., Path]):
    tokenizer = Gpt2Tokenizer()
    tokens = [tokenizer.end_of_text, *tokenizer.encode("Hello, world: <|endoftext|>").tolist()]
    assert describe(make_folder(tokens, tokens), lines=1).training == ("Hello, world: <|endoftext|>",)


def test_a_shard_of_any_size_is_shown_at_once(bytes_folder: Callable[..., Path]):
    folder = bytes_folder(shard("x"), shard("y"))
    os.truncate(folder / "shard_000001.bin", 10**12)  # zeros that take no room, and more than any memory
    assert describe(folder, lines=1).training == ("y" + "\0" * (CHARACTERS - 1),)


def test_sizes_are_those_on_the_disk_and_a_missing_shard_has_none(bytes_folder: Callable[..., Path]):
    folder = bytes_folder(shard("x"), shard("y"), shard("z"))
    (folder / "shard_000001.bin").unlink()
    os.truncate(folder / "shard_000002.bin", 1025)
    found = describe(folder, lines=3)
    assert found.sizes == (1028, None, 1025)
    assert found.training == ()
    assert found.manifest == load_manifest(folder)


@pytest.mark.parametrize("size", [0, 1023, 1024, 1025])
def test_a_shard_without_tokens_shows_none(bytes_folder: Callable[..., Path], size: int):
    folder = bytes_folder(shard("x"), shard("y"))
    os.truncate(folder / "shard_000001.bin", size)
    assert describe(folder, lines=3).training == ()


def test_a_token_beyond_the_vocabulary_is_named_with_its_file(bytes_folder: Callable[..., Path]):
    folder = bytes_folder(shard("x"), [256, 300])
    with pytest.raises(AsgoError, match=r"shard_000001\.bin: damaged: token 300 is outside the vocabulary of 257"):
        describe(folder, lines=1)


def test_folders_that_cannot_be_described_are_named(tmp_path: Path):
    with pytest.raises(UsageError, match="nowhere: no such data folder"):
        describe(tmp_path / "nowhere", lines=1)
    with pytest.raises(AsgoError, match=r"no manifest\.json"):
        describe(tmp_path, lines=1)
    (tmp_path / "unfinished.json").write_text("{}")
    with pytest.raises(AsgoError, match="unfinished; run the command that started it again to resume"):
        describe(tmp_path, lines=1)
