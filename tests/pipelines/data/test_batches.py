import os
import resource
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.config import DataOrder
from pipelines.data.batches import TokenData, TrainingBatches, ValidationBatches, open_token_data
from pipelines.errors import AsgoError, UsageError

SIZES = (150, 201, 96, 7, 160)  # validation, then training shards; the one of 7 is too short for a window of 8
CONTEXT = 8


@pytest.fixture
def data(make_folder: Callable[..., Path]) -> TokenData:
    """Tokens that count upwards through all shards, so that a window tells where it comes from."""
    ends = np.cumsum(SIZES)
    return open_token_data(make_folder(*(range(end - size, end) for size, end in zip(SIZES, ends, strict=True))))


def windows_of_an_epoch() -> set[tuple[int, ...]]:
    """Inputs and one target of every training window, written down without the code under test."""
    windows, start = set(), SIZES[0]
    for size in SIZES[1:]:
        for first in range(0, size - CONTEXT, CONTEXT):
            windows.add(tuple(range(start + first, start + first + CONTEXT + 1)))
        start += size
    return windows


def rows(inputs: torch.Tensor, targets: torch.Tensor) -> list[tuple[int, ...]]:
    return [(*row, last[-1]) for row, last in zip(inputs.tolist(), targets.tolist(), strict=True)]


def test_an_epoch_holds_every_window_once_and_the_next_one_in_another_order(data: TokenData):
    batches = TrainingBatches(data, CONTEXT, batch_size=5, seed=3)
    count = batches.windows_per_epoch
    expected = windows_of_an_epoch()
    assert count == len(expected) == 25 + 11 + 19
    seen = [row for step in range(2 * count // 5) for row in rows(*batches.batch(step))]
    first, second = seen[:count], seen[count:]
    assert set(first) == set(second) == expected
    assert first != second
    assert first != sorted(first)


def test_targets_are_the_inputs_shifted_by_one(data: TokenData):
    inputs, targets = TrainingBatches(data, CONTEXT, batch_size=4, seed=0).batch(7)
    assert inputs.shape == targets.shape == (4, CONTEXT)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.is_contiguous()
    assert targets.is_contiguous()
    assert torch.equal(targets, inputs + 1)  # the stream counts upwards


def test_a_batch_costs_no_memory_but_its_own(make_folder: Callable[..., Path]):
    data = open_token_data(make_folder(range(2000), *[np.arange(20_000)] * 3))
    batches = TrainingBatches(data, context_length=1000, batch_size=32, seed=0)
    batches.batch(0)
    tracemalloc.start()  # it sees what numpy takes, and not torch's memory: the batch itself
    inputs, _ = batches.batch(1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < inputs.numel() / 2  # even as 16-bit numbers, the tokens would take four times as much


@pytest.mark.gpu
def test_a_gpu_fetches_batches_from_where_they_were_made(data: TokenData):
    plain, pinned = (TrainingBatches(data, CONTEXT, batch_size=5, seed=3, pinned=pinned) for pinned in (False, True))
    for part, same in zip(pinned.batch(4), plain.batch(4), strict=True):
        assert part.is_pinned()
        assert not same.is_pinned()
        assert torch.equal(part, same)
    assert all(part.is_pinned() for part in ValidationBatches(data, CONTEXT, 6, pinned=True).read(range(3)))


def test_in_sequence_a_shard_gives_whole_batches_in_its_order_and_every_epoch_is_the_same(data: TokenData):
    batches = TrainingBatches(data, CONTEXT, batch_size=5, seed=3, order="sequential")
    first_of_shard, expected = SIZES[0], []
    for size, whole_batches in zip(SIZES[1:], (5, 2, 0, 3), strict=True):  # of 25, 11, 0 and 19 windows
        starts = range(first_of_shard, first_of_shard + 5 * whole_batches * CONTEXT, CONTEXT)
        expected += [tuple(range(start, start + CONTEXT + 1)) for start in starts]
        first_of_shard += size
    assert batches.windows_per_epoch == len(expected) == 50
    assert [row for step in range(20) for row in rows(*batches.batch(step))] == 2 * expected
    assert batches.epoch_at(15) == 1.5


def test_in_sequence_a_shard_must_fill_a_batch(data: TokenData):
    assert TrainingBatches(data, CONTEXT, batch_size=25, seed=0, order="sequential").windows_per_epoch == 25
    with pytest.raises(
        AsgoError, match=r"longest training shard has 201 tokens, and one batch of 26 windows in .* 209"
    ):
        TrainingBatches(data, CONTEXT, batch_size=26, seed=0, order="sequential")


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_processes_take_slices_of_the_same_batch(data: TokenData, ranks: int, order: DataOrder):
    whole = TrainingBatches(data, CONTEXT, batch_size=8, seed=1, order=order)
    each = 8 // ranks
    for step in (0, 6, 7, 13, 100):
        parts = [
            TrainingBatches(data, CONTEXT, 8, seed=1, order=order).batch(step, slice(rank * each, (rank + 1) * each))
            for rank in range(ranks)
        ]
        for place in (0, 1):
            assert torch.equal(torch.cat([part[place] for part in parts]), whole.batch(step)[place])


def test_a_batch_depends_on_the_step_alone_and_not_on_what_was_read_before(data: TokenData):
    straight = TrainingBatches(data, CONTEXT, batch_size=7, seed=1)
    expected = [straight.batch(step)[0] for step in range(40)]
    jumping = TrainingBatches(data, CONTEXT, batch_size=7, seed=1)
    for step in (39, 0, 20, 7, 8, 39, 1):
        assert torch.equal(jumping.batch(step)[0], expected[step])


def test_the_stream_does_not_depend_on_the_batch_size(data: TokenData):
    count = len(windows_of_an_epoch())
    streams = []
    for batch_size in (1, 6, 3 * count):  # the last one holds three epochs in a batch
        batches = TrainingBatches(data, CONTEXT, batch_size, seed=9)
        steps = range(3 * count // batch_size)
        streams.append([row for step in steps for row in rows(*batches.batch(step))])
    shortest = min(map(len, streams))
    assert shortest > 2.8 * count
    assert streams[0][:shortest] == streams[1][:shortest] == streams[2][:shortest]


def test_the_seed_changes_the_order(data: TokenData):
    one, other = (TrainingBatches(data, CONTEXT, 20, seed).batch(0)[0] for seed in (0, 1))
    assert not torch.equal(one, other)


def test_the_epoch_is_counted_in_windows(data: TokenData):
    batches = TrainingBatches(data, CONTEXT, batch_size=11, seed=0)
    assert [batches.epoch_at(step) for step in (0, 5, 10)] == [0.0, 1.0, 2.0]
    assert batches.epoch_at(1) == pytest.approx(0.2)


def test_validation_is_always_the_same_and_spread_over_the_whole_shard(data: TokenData):
    inputs, targets = ValidationBatches(data, CONTEXT, 6).read(range(6))
    for places in (range(2), range(2, 6), range(5, 6)):
        part, _ = ValidationBatches(data, CONTEXT, 6).read(places)
        assert torch.equal(part, inputs[places.start : places.stop])
    assert torch.equal(targets, inputs + 1)
    starts = inputs[:, 0].tolist()
    assert len(set(starts)) == 6
    assert (starts[0], starts[-1]) == (0, 17 * CONTEXT)  # (150 - 1) // 8 = 18 windows
    gaps = np.diff(starts) // CONTEXT
    assert set(gaps.tolist()) <= {3, 4}


@pytest.mark.parametrize("count", [None, 18, 1000])
def test_a_short_validation_shard_is_used_whole_and_each_window_once(data: TokenData, count: int | None):
    batches = ValidationBatches(data, CONTEXT, count)
    assert len(batches) == 18
    inputs, _ = batches.read(range(18))
    assert inputs[:, 0].tolist() == list(range(0, 144, CONTEXT))


def test_an_evenly_spaced_choice_never_takes_a_window_twice(data: TokenData):
    for count in range(1, 19):
        inputs, _ = ValidationBatches(data, CONTEXT, count).read(range(count))
        assert len(set(inputs[:, 0].tolist())) == count


def test_several_validation_shards_are_used_like_one(data: TokenData):
    several = replace(data, validation=data.train)
    everything = ValidationBatches(several, CONTEXT, None)
    read = rows(*everything.read(range(len(everything))))
    assert len(read) == 25 + 11 + 19
    assert set(read) == windows_of_an_epoch()
    chosen = rows(*ValidationBatches(several, CONTEXT, 5).read(range(5)))
    assert [read.index(row) for row in chosen] == [0, 13, 27, 40, 54]


def test_validation_from_the_start_is_the_first_windows_in_their_order(data: TokenData):
    inputs, _ = ValidationBatches(data, CONTEXT, 6, from_start=True).read(range(6))
    assert inputs.flatten().tolist() == list(range(6 * CONTEXT))
    several = ValidationBatches(replace(data, validation=data.train), CONTEXT, 30, from_start=True)
    assert set(rows(*several.read(range(30)))) == set(sorted(windows_of_an_epoch())[:30])
    assert len(ValidationBatches(data, CONTEXT, 18, from_start=True)) == 18
    with pytest.raises(AsgoError, match=r"have 144 tokens in windows .* 8, and evaluation\.tokens is 152; lower it"):
        ValidationBatches(data, CONTEXT, 19, from_start=True)


def test_shards_too_short_for_a_window_are_refused_with_the_figures(data: TokenData):
    TrainingBatches(data, 200, batch_size=1, seed=0)
    with pytest.raises(AsgoError, match=r"longest training shard has 201 tokens, .* length 201 needs 202"):
        TrainingBatches(data, 201, batch_size=1, seed=0)
    assert len(ValidationBatches(data, 149, 1)) == 1
    with pytest.raises(AsgoError, match=r"longest validation shard has 150 tokens, .* length 150 needs 151"):
        ValidationBatches(data, 150, 1)


def test_opening_costs_no_memory_in_proportion_to_the_tokens(make_folder: Callable[..., Path]):
    folder = make_folder(range(100), np.zeros(4_000_000, dtype=np.uint16))
    open_token_data(folder)
    tracemalloc.start()
    data = open_token_data(folder)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(data.train[0]) == 4_000_000
    assert peak < 4_000_000  # the file has 8 MB; it is looked through by 2 MB


def test_a_shard_that_becomes_shorter_ends_in_one_line(make_folder: Callable[..., Path]):
    folder = make_folder(range(1000), range(1000))
    data = open_token_data(folder)
    batches, validation = TrainingBatches(data, 100, batch_size=9, seed=0), ValidationBatches(data, 100, 9)
    for index, read in enumerate([lambda: validation.read(range(9)), lambda: batches.batch(0)]):
        path = folder / f"shard_{index:06}.bin"
        os.truncate(path, 1500)
        with pytest.raises(AsgoError, match=rf"{path.name}: it has become shorter while in use"):
            read()


def test_a_folder_that_is_replaced_while_it_is_in_use_stays_what_it_was(make_folder: Callable[..., Path]):
    folder = make_folder(range(1000), range(1000))
    batches = TrainingBatches(open_token_data(folder), 100, batch_size=9, seed=0)
    before = batches.batch(0)[0]
    shutil.rmtree(folder)
    make_folder(range(1000), range(1000, 2000))
    assert torch.equal(batches.batch(0)[0], before)


def test_more_shards_than_a_process_may_have_open_can_be_read(make_folder: Callable[..., Path]):
    folder = make_folder(*[range(10)] * 70)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/dev/fd").iterdir())) + 60, limits[1]))
    try:
        assert len(open_token_data(folder).train) == 69
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize(
    ("name", "advice"),
    [("my train.bin", "pass its folder: --data '{}'"), ("a b.txt", "asgo data text '{}' --out FOLDER")],
)
def test_a_file_instead_of_a_folder_gets_advice(tmp_path: Path, name: str, advice: str):
    path = tmp_path / "my data" / name
    path.parent.mkdir()
    path.touch()
    with pytest.raises(UsageError) as caught:
        open_token_data(path)
    assert "this is a file" in str(caught.value)
    assert advice.format(path.parent if path.suffix == ".bin" else path) in str(caught.value)


def test_opening_gives_what_training_needs(data: TokenData):
    assert [len(shard) for shard in (*data.validation, *data.train)] == list(SIZES)
    assert data.vocab_size == 50_257
    assert data.tokenizer == {"name": "gpt2"}
    assert len(data.fingerprint) == 64


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("shakespeare_char", "asgo data shakespeare --out {}"),
        ("fineweb", "asgo data fineweb --out {}"),
        ("my data", "asgo data text FILE... --out '{}'"),
    ],
)
def test_a_missing_folder_names_the_command_that_makes_it(tmp_path: Path, name: str, command: str):
    with pytest.raises(UsageError) as caught:
        open_token_data(tmp_path / name)
    assert str(caught.value).endswith(f"no such data folder; make it with: {command.format(tmp_path / name)}")


def test_a_folder_that_is_incomplete_or_altered_is_refused(make_folder: Callable[..., Path]):
    folder = make_folder(range(50), range(60), range(70))
    shard = folder / "shard_000002.bin"
    other = make_folder(range(50), range(60), range(80), name="other") / shard.name
    shard.write_bytes(other.read_bytes())
    with pytest.raises(AsgoError, match=r"shard_000002\.bin: 80 tokens, but the manifest says 70"):
        open_token_data(folder)
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(AsgoError, match=r"shard_000002\.bin: .*truncated"):
        open_token_data(folder)
    shard.unlink()
    with pytest.raises(AsgoError, match=r"shard_000002\.bin: this shard is missing"):
        open_token_data(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(AsgoError, match=r"no manifest\.json"):
        open_token_data(folder)


def test_tokens_beyond_the_vocabulary_are_refused(make_folder: Callable[..., Path]):
    with pytest.raises(AsgoError, match=r"shard_000001\.bin: token 257 is beyond the vocabulary of 257"):
        open_token_data(make_folder(range(50), range(258), tokenizer="bytes"))
