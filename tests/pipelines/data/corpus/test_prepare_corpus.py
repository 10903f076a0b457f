"""From a local mirror: the right shards, whatever happened on the way to them."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest

from pipelines.data.batches import open_token_data
from pipelines.data.corpus.corpus_to_shards import CorpusOptions
from pipelines.data.corpus.pipeline import Status
from pipelines.data.corpus.sources import FINEWEB, OPENWEBTEXT, Corpus
from pipelines.data.holding import held_folder
from pipelines.data.manifest import DocumentCounts, load_manifest
from pipelines.data.verify import verify
from pipelines.errors import AsgoError, RunInterrupted, UsageError

from .mirrors import Preparation, contents, expected_shards, shards_in, write_mirror

pytestmark = pytest.mark.usefixtures("forked_children")  # test_kills.py starts them as the command does

SMALL = {"shards": 4, "shard_tokens": 20_000, "workers": 2}


@pytest.fixture(scope="module")
def done(mirror: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed run makes."""
    out = tmp_path_factory.mktemp("done") / "data" / "fineweb"
    Preparation(FINEWEB, CorpusOptions(source=str(mirror), **SMALL)).run(out)
    return out


def test_the_first_shard_of_the_stream_validates_and_the_next_ones_train(done: Path, texts: list[list[str]]):
    assert shards_in(done) == expected_shards(list(chain(*texts)), 4, 20_000, None)
    assert [result.problem for result in verify(done)] == [None] * 5
    manifest = load_manifest(done)
    assert [shard.tokens for shard in manifest.shards] == [20_000] * 5
    read = list(chain(*texts))[: manifest.documents.read]
    assert manifest.documents == DocumentCounts(
        read=len(read),
        empty=sum(not text.strip() for text in read),
        literal_end_of_text=sum("<|endoftext|>" in text for text in read),
    )
    assert sorted(path.name for path in done.iterdir()) == ["manifest.json", *(shard.file for shard in manifest.shards)]
    assert len(open_token_data(done).train) == 4


def test_lines_of_json_give_the_same_bytes_as_rows_of_parquet(done: Path, texts: list[list[str]], tmp_path: Path):
    lines = write_mirror(tmp_path / "lines", texts, "jsonl")
    Preparation(FINEWEB, CorpusOptions(source=str(lines), **SMALL)).run(tmp_path / "out")
    assert shards_in(tmp_path / "out") == shards_in(done)


def test_a_copy_of_the_repository_has_its_subsets_and_files_may_be_packed(
    done: Path, texts: list[list[str]], tmp_path: Path
):
    copy = tmp_path / "copy"
    write_mirror(copy / "data", [["of the whole, and not of the sample"]], "jsonl")
    for path in write_mirror(copy / "sample", texts, "jsonl").iterdir():
        (copy / "sample" / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {part}/*\n"
        for name, part in (("default", "data"), ("sample-10BT", "sample"))
    )
    (copy / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    Preparation(FINEWEB, CorpusOptions(source=str(copy), **SMALL)).run(tmp_path / "out")
    assert shards_in(tmp_path / "out") == shards_in(done)
    with pytest.raises(AsgoError, match=r"no such subset: sample; there are \['default', 'sample-10BT'\]"):
        Preparation(FINEWEB, CorpusOptions(source=str(copy), subset="sample")).run(tmp_path / "other")


def test_of_openwebtext_every_nth_document_validates(mirror: Path, texts: list[list[str]], tmp_path: Path):
    often = replace(OPENWEBTEXT, validate_every=50)
    manifest = Preparation(often, CorpusOptions(source=str(mirror), **SMALL)).run(tmp_path / "out")
    assert shards_in(tmp_path / "out") == expected_shards(list(chain(*texts)), 4, 20_000, 50)
    assert manifest.shards[0].next_start.document == 1
    assert OPENWEBTEXT.validate_every == 2000  # a fraction of 0.0005


def test_a_source_that_ends_early_gives_a_shorter_last_shard(mirror: Path, texts: list[list[str]], tmp_path: Path):
    options = CorpusOptions(source=str(mirror), shards=40, shard_tokens=50_000)
    Preparation(FINEWEB, options).run(tmp_path / "out")
    expected = expected_shards(list(chain(*texts)), 40, 50_000, None)
    assert 2 < len(expected) < 40
    assert shards_in(tmp_path / "out") == expected


def test_a_source_too_short_for_two_shards_is_an_error_that_says_what_to_do(mirror: Path, tmp_path: Path):
    preparation = Preparation(FINEWEB, CorpusOptions(source=str(mirror)))
    with pytest.raises(AsgoError, match="too few for a validation and a training shard; choose a smaller --shard-tok"):
        preparation.run(tmp_path / "out")
    with pytest.raises(AsgoError, match="unfinished"):
        open_token_data(tmp_path / "out")


class StopAt:
    """Sends the process a signal, as Ctrl-C or a scheduler does, when so many tokens are written."""

    def __init__(self, tokens: int, number: int) -> None:
        self.tokens = tokens
        self.number = number

    def __call__(self, status: Status) -> None:
        if status.tokens >= self.tokens:
            self.tokens = sys.maxsize
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("corpus", [FINEWEB, replace(OPENWEBTEXT, validate_every=50)], ids=lambda each: each.name)
def test_stopped_again_and_again_it_ends_with_the_same_bytes(
    corpus: Corpus, mirror: Path, done: Path, texts: list[list[str]], tmp_path: Path
):
    out = tmp_path / "out"
    preparation = Preparation(corpus, CorpusOptions(source=str(mirror), **SMALL))
    for tokens, number in ((1, signal.SIGINT), (30_000, signal.SIGTERM)):
        preparation.report = StopAt(tokens, number)
        with pytest.raises(RunInterrupted, match=r"tokens are written; run the same command again"):
            preparation.run(out)
        journal = json.loads((out / "unfinished.json").read_text())
        assert journal["last_batch"] is not None
    preparation.report = None
    preparation.run(out)
    assert preparation.statuses[0].tokens >= 30_000
    if corpus is FINEWEB:
        assert contents(out) == contents(done)
    else:
        assert shards_in(out) == expected_shards(list(chain(*texts)), 4, 20_000, 50)


def test_the_same_command_finds_its_work_done_and_another_one_is_refused(mirror: Path, done: Path):
    before = contents(done)
    options = CorpusOptions(source=str(mirror), **SMALL)
    assert Preparation(FINEWEB, options).run(done) == load_manifest(done)
    for change, difference in (
        ({"shards": 5}, "--shards 4 and not 5"),
        ({"shard_tokens": 30_000}, "--shard-tokens 20,000 and not 30,000"),
        ({"source": str(mirror.parent)}, f"--source {mirror} and not {mirror.parent}"),
        ({"source": "hub"}, "--subset none and not sample-10BT"),
    ):
        with pytest.raises(UsageError) as refused:
            Preparation(FINEWEB, replace(options, **change)).run(done)
        assert difference in str(refused.value)
        assert "--overwrite" in str(refused.value)
    assert contents(done) == before


def test_an_unfinished_folder_is_no_data_and_goes_on_with_its_own_options_alone(mirror: Path, tmp_path: Path):
    out = tmp_path / "out"
    preparation = Preparation(FINEWEB, CorpusOptions(source=str(mirror), **SMALL))
    preparation.report = StopAt(30_000, signal.SIGTERM)
    with pytest.raises(RunInterrupted):
        preparation.run(out)
    with pytest.raises(AsgoError, match="unfinished; run the command that started it again to resume"):
        load_manifest(out)
    with pytest.raises(UsageError, match="unfinished, made with corpus fineweb and not openwebtext"):
        Preparation(OPENWEBTEXT, preparation.options).run(out)
    before = contents(out)
    other = Preparation(FINEWEB, replace(preparation.options, shards=2))
    with pytest.raises(UsageError, match="--shards 4 and not 2"):
        other.run(out)
    assert contents(out) == before
    other.run(out, overwrite=True)
    assert [shard.tokens for shard in load_manifest(out).shards] == [20_000] * 3
    assert len(list(out.iterdir())) == 4


def test_a_source_that_changed_is_not_gone_on_with(mirror: Path, texts: list[list[str]], tmp_path: Path):
    copy = write_mirror(tmp_path / "mirror", texts, "jsonl")
    preparation = Preparation(FINEWEB, CorpusOptions(source=str(copy), **SMALL))
    preparation.report = StopAt(30_000, signal.SIGTERM)
    with pytest.raises(RunInterrupted):
        preparation.run(tmp_path / "out")
    path = copy / "000.jsonl"
    original = path.read_text()
    path.write_text(original + '{"text": "one more"}\n')
    with pytest.raises(UsageError, match=r"the files have changed since .* was started; pass --overwrite"):
        preparation.run(tmp_path / "out")
    path.write_text(original.replace("optimizer", "optimiser"))  # of the same size
    with pytest.raises(AsgoError, match="the text has changed since the shards were started; pass --overwrite"):
        preparation.run(tmp_path / "out")


def test_overwrite_spares_a_folder_that_holds_anything_else(mirror: Path, tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    preparation = Preparation(FINEWEB, CorpusOptions(source=str(mirror), **SMALL))
    with pytest.raises(UsageError, match="not empty"):
        preparation.run(tmp_path)
    with pytest.raises(UsageError, match=r"thesis\.tex is not part of a corpus, so nothing is overwritten"):
        preparation.run(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def test_two_processes_do_not_prepare_one_folder(mirror: Path, tmp_path: Path):
    with held_folder(tmp_path / "out"):
        code = (
            "import sys; from pathlib import Path; from pipelines.data.holding import held_folder\n"
            "with held_folder(Path(sys.argv[1])): pass"
        )
        second = subprocess.run([sys.executable, "-c", code, tmp_path / "out"], capture_output=True, text=True)
    assert "another process is preparing data in this folder" in second.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"shards": 0}, "--shards must be at least 1, not 0"),
        ({"shard_tokens": 2**31}, "--shard-tokens must lie between 1 and 2,147,483,647, not 2,147,483,648"),
        ({"workers": 0}, "--workers must be at least 1, not 0"),
        ({"source": "no/such"}, '--source no/such: no such folder; pass "hub" or a folder'),
        ({"subset": "x"}, "is a plain folder of files; omit --subset"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_made(options: dict, expected: str, mirror: Path, tmp_path: Path):
    with pytest.raises(UsageError) as refused:
        Preparation(FINEWEB, CorpusOptions(**{"source": str(mirror), **options})).run(tmp_path / "out")
    assert expected in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.parquet", b"PAR1 and no more", "a.parquet: damaged file"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": "torn', "a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', "a.jsonl, line 1: not valid JSON ('utf-8' codec"),
        ("a.jsonl.gz", b"\x1f\x8b and then nonsense", "a.jsonl.gz: damaged file"),
        ("a.jsonl.gz", gzip.compress(bytes(65 << 20), 1), "a.jsonl.gz, line 1: longer than 67,108,864 bytes"),
        ("a.doc", b"", "no file ends in one of .parquet, .jsonl"),
    ],
)
def test_a_damaged_source_is_named_at_once(name: str, content: bytes, expected: str, tmp_path: Path):
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / name).write_bytes(content)
    preparation = Preparation(FINEWEB, CorpusOptions(source=str(tmp_path / "mirror"), **SMALL))
    with pytest.raises(AsgoError) as caught:
        preparation.run(tmp_path / "out")
    assert expected in str(caught.value)
    assert str(caught.value).count(str(tmp_path)) == 1
    assert "\n" not in str(caught.value)
    assert preparation.notes == []
