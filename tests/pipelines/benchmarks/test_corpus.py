from pathlib import Path

import pytest

from pipelines.benchmarks.corpus import POOL, bench_corpus
from pipelines.errors import AsgoError

TEXT = "The quick brown fox jumps over the lazy dog. " * 40 + "<|endoftext|>"


def write_lines(path: Path, count: int) -> Path:
    path.write_text("".join(f'{{"text": "{number}: {TEXT}"}}\n' for number in range(count)))
    return path


def test_all_ways_give_the_same_tokens_and_each_its_own_rate(tmp_path: Path):
    turns = []
    report = bench_corpus(
        [write_lines(tmp_path / "text.jsonl", 2000)], 1, 1, lambda what, done, total: turns.append((what, done, total))
    )
    pool, *ours = report.contestants
    assert [pool.name, *(each.name for each in ours)] == [POOL, "asgo, tiktoken", "asgo, gigatoken"]
    assert report.same_tokens
    assert (report.documents, report.workers) == (2000, 1)
    assert report.bytes == (tmp_path / "text.jsonl").stat().st_size - 2000 * len('{"text": ""}\n')
    assert len({each.rates[0] for each in report.contestants}) == 3
    assert pool.speedup(pool) == 1
    assert pool.tokens > 2000 * 400
    assert turns == [(each.name, turn, 4) for turn, each in enumerate(report.contestants)] + [("batches", 3, 4)]
    assert report.as_json()["tokenizing"][1]["speedup"] == pytest.approx(ours[0].rates[0] / pool.rates[0])


def test_too_little_text_is_refused(tmp_path: Path):
    with pytest.raises(AsgoError, match="too little text to measure"):
        bench_corpus([write_lines(tmp_path / "text.jsonl", 1)], 1, 1, lambda what, done, total: None)
