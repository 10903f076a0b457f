"""Which images are in a batch depends on the step alone, whoever makes them and whatever happens meanwhile."""

from __future__ import annotations

import contextlib
import functools
import io
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from pipelines.data.images.decode import BadImageError
from pipelines.data.images.loader import ImageBatch, TrainingImages, ValidationImages
from pipelines.data.images.transforms import CentreCrop, Key, RandomCrop, View
from pipelines.data.images.workers import ImageSource, ImageWorkers, default_workers
from pipelines.errors import AsgoError

IMAGES, BATCH, SEED = 50, 8, 7


@functools.cache
def encoded(index: int) -> bytes:
    """A small JPEG whose pixels say which it is."""
    rows = np.linspace(0, 255, 24)[:, None, None]
    pixels = np.broadcast_to(rows * [1, 0.5, 0] + [0, 0, 5 * index], (24, 30, 3))
    file = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=95)
    return file.getvalue()


@dataclass(frozen=True)
class Images:
    """A set of images in memory, in classes of five; those in `bad` are cut off."""

    count: int = IMAGES
    bad: frozenset[int] = frozenset()
    log: Path | None = None
    slow_s: float = 0.0

    @property
    def labels(self) -> NDArray[np.int64]:
        return np.arange(self.count) // 5

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"n{index // 5:08d}/n{index // 5:08d}_{index}.JPEG"

    def read(self, index: int) -> bytes:
        if self.slow_s:
            time.sleep(self.slow_s * (hash((os.getpid(), index, time.time_ns())) % 4))
        if self.log:
            with self.log.open("a") as file:
                file.write(f"{index}\n")
        return encoded(index)[: 300 if index in self.bad else None]


SOURCE = ImageSource(Images(), RandomCrop(16), SEED)


def training(workers: ImageWorkers, parts: Sequence[slice] = (slice(None),)) -> TrainingImages:
    return TrainingImages(workers, "train", BATCH, parts)


@contextlib.contextmanager
def in_line(source: ImageSource = SOURCE) -> Iterator[TrainingImages]:
    """Batches made by this process."""
    with ImageWorkers({"train": source}, 0) as workers:
        yield training(workers)


def same(one: ImageBatch, other: ImageBatch) -> bool:
    return torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@pytest.fixture(scope="module")
def expected() -> list[ImageBatch]:
    with in_line() as batches:
        return [batches.batch(step) for step in range(16)]


@pytest.fixture(scope="module")
def workers() -> Iterator[ImageWorkers]:
    slow = replace(SOURCE, images=Images(slow_s=0.002))
    bad = replace(SOURCE, images=Images(bad=frozenset({3})))
    sources = {
        "train": slow,
        "bad": bad,
        "without": replace(bad, on_bad="replace"),
        "validation": replace(slow, transform=CentreCrop(18, 16)),
        "threads": replace(SOURCE, transform=TellThreads()),
        "broken": replace(SOURCE, transform=Broken()),
    }
    with ImageWorkers(sources, 2) as started:
        yield started


@dataclass(frozen=True)
class TellThreads:
    """Says how many threads torch uses where it is called."""

    size: int = 16

    def view(self, height: int, width: int, key: Key) -> View:
        raise AsgoError(f"{torch.get_num_threads()} threads")


@dataclass(frozen=True)
class Broken:
    """A programming error."""

    size: int = 16

    def view(self, height: int, width: int, key: Key) -> View:
        raise ZeroDivisionError("while viewing")


def test_batches_are_pixels_by_channel_and_labels(expected: list[ImageBatch]):
    images, labels = expected[0]
    assert (images.shape, images.dtype) == ((BATCH, 3, 16, 16), torch.uint8)
    assert (labels.shape, labels.dtype) == ((BATCH,), torch.int64)
    centre = replace(SOURCE, transform=CentreCrop(24, 24))
    with in_line(centre) as batches:
        images, labels = batches.batch(0)
    blues = images[:, 2].float().mean(dim=(1, 2))
    assert torch.equal((blues / 25).floor().long(), labels)


def test_each_epoch_has_every_image_once_in_its_own_order():
    source = replace(SOURCE, transform=CentreCrop(24, 24))
    with in_line(source) as batches:
        stream = torch.cat([batches.batch(step)[0] for step in range(13)])[: 2 * IMAGES]
        assert batches.epoch_at(25) == 4.0
    pictures = [image.numpy().tobytes() for image in stream]
    first, second = pictures[:IMAGES], pictures[IMAGES:]
    assert len(set(first)) == IMAGES
    assert set(first) == set(second)
    assert first != second


def test_a_batch_is_a_pure_function_of_the_step(expected: list[ImageBatch]):
    with in_line() as batches:
        assert all(same(batches.batch(step), expected[step]) for step in (9, 0, 15, 6, 6, 7, 5, 13, 0))
    with in_line(replace(SOURCE, seed=SEED + 1)) as batches:
        assert not torch.equal(batches.batch(0)[1], expected[0][1])


def test_an_image_is_cut_otherwise_in_each_epoch_and_alike_in_batches_of_any_size():
    one = replace(SOURCE, images=Images(1))
    with ImageWorkers({"train": one}, 0) as workers:
        together = TrainingImages(workers, "train", 6).batch(0)[0]
        apart = TrainingImages(workers, "train", 2)
        assert torch.equal(torch.cat([apart.batch(step)[0] for step in range(3)]), together)
    assert len({image.numpy().tobytes() for image in together}) == 6


@pytest.mark.parametrize(
    "parts",
    [[slice(None)], [slice(0, 4), slice(4, 8)], [slice(4, 6), slice(6, 8)], [slice(1, None, 3)]],
    ids=["whole", "micro-batches", "of rank 1 of 2", "every third"],
)
def test_processes_of_any_speed_give_the_same_batches_in_parts(
    workers: ImageWorkers, expected: list[ImageBatch], parts: list[slice]
):
    batches = training(workers, parts)
    for step in (0, 1, 2, 3, 11, 12, 4, 5):
        for part in parts:
            images, labels = batches.batch(step, part)
            assert same((images, labels), (expected[step][0][part], expected[step][1][part]))
    assert same(batches.batch(6), expected[6])  # which was not announced
    assert same(batches.batch(7, slice(3, 5)), (expected[7][0][3:5], expected[7][1][3:5]))


def test_the_next_batches_are_made_meanwhile(tmp_path: Path, expected: list[ImageBatch]):
    images = Images(log=tmp_path / "read")
    others = set(multiprocessing.active_children())
    with ImageWorkers({"train": replace(SOURCE, images=images)}, 1) as workers:
        batches = training(workers)
        batches.batch(0)
        deadline = time.monotonic() + 60
        ahead = 6 * BATCH  # the first, and then enough for the process never to wait
        while len(images.log.read_text().split()) < ahead and time.monotonic() < deadline:  # type: ignore[union-attr]
            time.sleep(0.01)
        assert same(batches.batch(1), expected[1])
        assert len(set(multiprocessing.active_children()) - others) == 1
    read = images.log.read_text().split()  # type: ignore[union-attr]
    assert ahead <= len(read) <= ahead + BATCH
    assert set(multiprocessing.active_children()) <= others


def ranges(size: int) -> list[range]:
    """All images, so many at once."""
    return [range(first, min(first + size, IMAGES)) for first in range(0, IMAGES, size)]


def test_validation_shows_the_images_that_it_was_asked_for_in_order_each_time(workers: ImageWorkers):
    centre = replace(SOURCE, transform=CentreCrop(18, 16))
    with ImageWorkers({"validation": centre}, 0) as alone:
        ((images, labels),) = ValidationImages(alone, "validation", ranges(IMAGES))
    asked = [range(7, 14), range(28, 30), range(0), range(IMAGES - 1, IMAGES)]
    validation = ValidationImages(workers, "validation", asked)
    assert len(validation) == len(asked)
    for _ in range(2):
        for batch, places in zip(validation, asked, strict=True):
            assert same(batch, (images[list(places)], labels[list(places)]))


@pytest.mark.parametrize("source", ["train", "bad"])
def test_an_iteration_that_is_given_up_leaves_the_processes_usable(workers: ImageWorkers, source: str):
    given_up = iter(ValidationImages(workers, source, ranges(3)))
    with contextlib.suppress(BadImageError):
        for _ in range(2 if source == "train" else IMAGES):
            next(given_up)
    del given_up
    assert len(list(ValidationImages(workers, "validation", ranges(40)))) == 2


def test_an_image_that_cannot_be_decoded_stops_the_run_with_its_name(workers: ImageWorkers):
    bad = Images(bad=frozenset({3}))
    step = next(step for step in range(7) if 3 in places(step))
    message = r"^n00000000/n00000000_3.JPEG: this image cannot be decoded: .* \(300 bytes\)$"
    with in_line(replace(SOURCE, images=bad)) as batches, pytest.raises(BadImageError, match=message):
        batches.batch(step)
    with pytest.raises(BadImageError, match=message):
        TrainingImages(workers, "bad", BATCH).batch(step)


def places(step: int) -> list[int]:
    """The images of a batch of the first epoch."""
    with in_line(replace(SOURCE, images=OneClassEach())) as batches:
        return batches.batch(step)[1].tolist()


class OneClassEach(Images):
    @property
    def labels(self) -> NDArray[np.int64]:
        return np.arange(self.count)


def test_the_next_image_stands_in_for_one_that_is_skipped(workers: ImageWorkers, expected: list[ImageBatch]):
    bad = Images(bad=frozenset({3, 4, IMAGES - 1}))
    source = replace(SOURCE, images=bad, on_bad="replace", transform=CentreCrop(24, 24))
    with in_line(source) as batches:
        made = [batches.batch(step) for step in range(7)]  # a whole epoch
        assert sorted(batches.skipped) == sorted(map(bad.name, bad.bad))
    with in_line(replace(source, images=Images())) as batches:
        good = [batches.batch(step) for step in range(7)]
    by_image = {index: good[step][0][row] for step in range(7) for row, index in enumerate(places(step))}
    for step, (images, labels) in enumerate(made):
        for row, index in enumerate(places(step)):
            stand_in = {3: 5, 4: 5, IMAGES - 1: 0}.get(index, index)
            assert labels[row] == stand_in // 5
            assert torch.equal(images[row], by_image[stand_in])
    one = Images(bad=frozenset({3}))
    by_processes = TrainingImages(workers, "without", BATCH)
    with in_line(replace(SOURCE, images=one, on_bad="replace")) as batches:
        assert all(same(batches.batch(step), by_processes.batch(step)) for step in range(8))
        assert list(by_processes.skipped) == list(batches.skipped) == [one.name(3)]
        assert by_processes.skipped[one.name(3)].startswith(f"{one.name(3)}: this image cannot be decoded")


def test_in_validation_it_is_left_out_and_counted():
    bad = Images(bad=frozenset({0, 3, 20, 21, 22, 23}))
    source = replace(SOURCE, images=bad, on_bad="leave out")
    with ImageWorkers({"validation": source}, 0) as workers:
        validation = ValidationImages(workers, "validation", ranges(4))
        batches = list(validation)
    assert [len(images) for images, _ in batches] == [2, 4, 4, 4, 4, 0, 4, 4, 4, 4, 4, 4, 2]
    labels = torch.cat([labels for _, labels in batches]).tolist()
    assert labels == [index // 5 for index in range(IMAGES) if index not in bad.bad]
    assert sorted(validation.skipped) == sorted(map(bad.name, bad.bad))


def test_nothing_but_bad_images_is_no_endless_search():
    bad = Images(bad=frozenset(range(IMAGES)))
    with (
        in_line(replace(SOURCE, images=bad, on_bad="replace")) as batches,
        pytest.raises(
            AsgoError, match=r"images in a row cannot be decoded, the last one n0.*; the data may be damaged"
        ),
    ):
        batches.batch(0)


def test_a_process_uses_one_thread_and_its_errors_arrive(workers: ImageWorkers):
    with pytest.raises(AsgoError, match=r"^1 threads$"):
        TrainingImages(workers, "threads", BATCH).batch(0)
    with pytest.raises(ZeroDivisionError) as broken:
        TrainingImages(workers, "broken", BATCH).batch(0)
    assert "in view" in broken.value.__notes__[0]


def test_processes_outlive_signals_to_all_and_one_that_is_killed_stops_the_run_in_one_line(expected: list[ImageBatch]):
    before = set(multiprocessing.active_children())
    with ImageWorkers({"train": SOURCE}, 1) as workers:
        (process,) = set(multiprocessing.active_children()) - before
        batches = training(workers)
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(int(process.pid or 0), each)  # while it imports torch
        batches.batch(0)
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(int(process.pid or 0), each)
        assert same(batches.batch(12), expected[12])
        os.kill(int(process.pid or 0), signal.SIGKILL)
        with pytest.raises(AsgoError, match=r"^a process that decodes images was killed; .* use fewer --workers$"):
            consume(batches, range(1, 20))


def consume(batches: TrainingImages, steps: range) -> None:
    for step in steps:
        batches.batch(step)


def test_there_is_a_process_for_each_processor_shared_by_the_ranks_of_a_machine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    for ranks, workers in (("1", 12), ("4", 3), ("5", 2), ("64", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert default_workers() == workers
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert default_workers() == 12


@pytest.mark.gpu
def test_batches_for_a_gpu_are_pinned():
    with ImageWorkers({"train": SOURCE}, 0, pinned=True) as workers:
        assert training(workers).batch(0)[0].is_pinned()
