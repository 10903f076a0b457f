"""How fast training batches are read."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.benchmarks import batches
from pipelines.benchmarks.batches import measure_batches
from pipelines.data.batches import TokenData, TrainingBatches, open_token_data
from pipelines.errors import AsgoError, UsageError


def test_the_rate_counts_the_tokens_of_the_batches_that_were_read(
    token_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    batch = TrainingBatches.batch

    def counted(self: TrainingBatches, step: int) -> Any:
        inputs, targets = batch(self, step)
        read.append(inputs.numel())
        return inputs, targets

    monkeypatch.setattr(TrainingBatches, "batch", counted)
    clock = SimpleNamespace(perf_counter=lambda: len(read) / 16)  # a batch takes a sixteenth of a second
    monkeypatch.setattr(batches, "time", clock)
    rate = measure_batches(token_folder, context_length=128, batch_size=16, seconds=0.5)
    assert read == [128 * 16] * 9  # the first one is not timed
    assert rate == 8 * 128 * 16 / 0.5


def test_without_a_folder_made_up_tokens_are_read_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(batches, "_SHARD_TOKENS", 100_000)
    readings = itertools.count()
    monkeypatch.setattr(batches, "time", SimpleNamespace(perf_counter=lambda: next(readings) / 8))
    opened = []

    def open_data(folder: Path) -> TokenData:
        opened.append((folder.parent, data := open_token_data(folder)))
        return data

    monkeypatch.setattr(batches, "open_token_data", open_data)
    rate = measure_batches(None, context_length=1024, batch_size=32, seconds=0.3)
    assert rate == 2 * 32 * 1024 / (3 / 8)  # the third reading of the clock ends it
    ((place, data),) = opened
    assert (place, data.vocab_size) == (tmp_path, 50257)
    assert not any(tmp_path.iterdir())


def test_a_folder_that_cannot_be_trained_on_is_an_error(tmp_path: Path, token_folder: Path) -> None:
    with pytest.raises(UsageError, match="no such data folder"):
        measure_batches(tmp_path / "none", 8, 4, 0.1)
    with pytest.raises(AsgoError, match="one window of context length 100,000"):
        measure_batches(token_folder, 100_000, 4, 0.1)
