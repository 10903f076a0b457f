"""Batches of decoded images are those that worker processes would make, and depend on the step alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.config import ImageDataSettings
from pipelines.data.images.augmentation import Distortion, RandomShift
from pipelines.data.images.decode import Pixels
from pipelines.data.images.image_sets import DecodedImages, ImageData, open_images
from pipelines.data.images.inputs import inputs_of, pixel_statistics
from pipelines.data.images.loader import DecodedTrainingImages, TrainingImages, ValidationImages, open_loaders
from pipelines.data.images.transforms import CentreCrop, RandomCrop
from pipelines.data.images.workers import ImageSource, ImageWorkers
from pipelines.errors import UsageError
from tests.pipelines.data.images.decoded_folders import stripes, write_decoded

pytestmark = pytest.mark.usefixtures("forked_children")

SIZE, COUNT, BATCH, SEED = 16, 50, 8, 7
WHOLE = CentreCrop(SIZE, SIZE)


def data_in(folder: Path, channels: int = 3) -> ImageData:
    splits = {"train": stripes(COUNT, SIZE, channels), "val": stripes(10, SIZE, channels, seed=1)}
    return open_images(write_decoded(folder, splits))


@pytest.fixture(params=[1, 3], ids=["gray", "colour"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> ImageData:
    return data_in(tmp_path / "data", request.param)


def source_of(data: ImageData) -> ImageSource:
    return ImageSource(data.train, WHOLE, SEED, shift=RandomShift(4, True, SEED, COUNT))


def training_of(source: ImageSource) -> DecodedTrainingImages:
    assert isinstance(source.images, DecodedImages)
    return DecodedTrainingImages(source.images, source.shift, source.seed, BATCH)


@pytest.mark.parametrize("shifted", [True, False])
def test_worker_processes_make_the_same_batches(data: ImageData, shifted: bool) -> None:
    source = source_of(data) if shifted else replace(source_of(data), shift=None)
    ours = training_of(source)
    with ImageWorkers({"train": source}, 1) as workers:
        theirs = TrainingImages(workers, "train", BATCH)
        for step in (0, 5, 6, 7, 30):  # the first epoch ends in step 6
            (pixels, labels), (others, other_labels) = ours.batch(step), theirs.batch(step)
            assert pixels.shape == (BATCH, data.train.pixels.shape[3], SIZE, SIZE)
            assert pixels.dtype == torch.uint8
            assert pixels.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(pixels, others)
            assert torch.equal(labels, other_labels)


def test_a_batch_is_a_function_of_the_step_and_its_rows(data: ImageData) -> None:
    training = training_of(source_of(data))
    pixels, labels = training.batch(6)
    training.batch(2)
    for rows in (slice(2, 5), [7, 0, 1]):
        some, some_labels = training_of(source_of(data)).batch(6, rows)
        assert torch.equal(some, pixels[rows])
        assert torch.equal(some_labels, labels[rows])
    assert training.epoch_at(25) == 25 * BATCH / COUNT


def test_an_epoch_has_every_image_once(data: ImageData) -> None:
    training = training_of(replace(source_of(data), shift=None))
    seen = torch.cat([training.batch(step)[0] for step in range(7)])[:COUNT].permute(0, 2, 3, 1).numpy()
    assert sorted(map(bytes, seen.reshape(COUNT, -1))) == sorted(map(bytes, data.train.pixels.reshape(COUNT, -1)))


def test_a_large_batch_is_shifted_in_chunks_to_the_same_pixels(tmp_path: Path) -> None:
    splits = {"train": stripes(300, SIZE), "val": stripes(4, SIZE)}
    source = source_of(open_images(write_decoded(tmp_path / "data", splits)))
    source = replace(source, shift=replace(source.shift, count=300))
    assert isinstance(source.images, DecodedImages)
    large = DecodedTrainingImages(source.images, source.shift, SEED, 290).batch(1)[0]
    small = [DecodedTrainingImages(source.images, source.shift, SEED, 10).batch(step)[0] for step in range(29, 58)]
    assert torch.equal(large, torch.cat(small))


def test_processes_start_only_for_what_is_to_be_made(data: ImageData) -> None:
    train, validation = source_of(data), ImageSource(data.validation, WHOLE)
    colour = (100,) * data.train.pixels.shape[3]
    for changed, decoders in (
        ((train, validation), 0),
        ((replace(train, distortion=Distortion(2, 9, 0.5, colour)), validation), 1),
        ((replace(train, transform=RandomCrop(SIZE)), replace(validation, transform=CentreCrop(18, SIZE))), 1),
    ):
        training, validating, workers = open_loaders(*changed, BATCH, [slice(None)], [range(6), range(6, 10)], 1)
        with workers:
            assert workers.size == decoders
            assert isinstance(training, TrainingImages) == bool(decoders)
            batches = [*training.batch(0), *(part for batch in validating for part in batch)]
            assert isinstance(validating, ValidationImages) == (changed[1].transform != WHOLE)
        assert [len(part) for part in batches] == [BATCH, BATCH, 6, 6, 4, 4]
        if changed[1].transform == WHOLE:
            expected = torch.from_numpy(np.array(data.validation.pixels)).permute(0, 3, 1, 2)
            assert torch.equal(torch.cat(batches[2::2]), expected)
            assert batches[3].tolist() + batches[5].tolist() == data.validation.labels.tolist()


def test_distorted_images_are_equal_for_any_number_of_processes_and_parts(data: ImageData) -> None:
    colour = (100,) * data.train.pixels.shape[3]
    source = replace(source_of(data), distortion=Distortion(2, 9, 0.5, colour))
    made = []
    for size, parts in ((0, [slice(None)]), (2, [slice(0, 4), slice(4, 8)])):
        with ImageWorkers({"train": source}, size) as workers:
            training = TrainingImages(workers, "train", BATCH, parts)
            made.append(torch.cat([training.batch(step, part)[0] for step in (0, 6) for part in parts]))
    assert torch.equal(*made)
    assert not torch.equal(made[0], torch.cat([training_of(source).batch(step)[0] for step in (0, 6)]))


def test_decoded_images_are_resized_as_encoded_ones(tmp_path: Path) -> None:
    """A gray image gives what its copy with three equal channels gives, also through Pillow."""
    gray, _ = stripes(COUNT, SIZE, 1)
    made: list[Pixels] = []
    for channels in (1, 3):
        splits = {name: (np.repeat(gray, channels, 3), stripes(COUNT)[1]) for name in ("train", "val")}
        data = open_images(write_decoded(tmp_path / str(channels), splits))
        sources = [ImageSource(data.train, RandomCrop(20), SEED, exact=exact) for exact in (False, True)]
        with ImageWorkers({"fast": sources[0], "exact": sources[1]}, 0) as workers:
            made.append(
                np.stack([TrainingImages(workers, name, COUNT).batch(0)[0].numpy() for name in workers.sources])
            )
    assert made[0].shape[2] == 1
    assert np.array_equal(np.repeat(made[0], 3, 2), made[1])
    assert np.abs(made[0][0].astype(int) - made[0][1]).max() <= 1


def test_mean_and_deviation_are_exact() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3000, 5, 4, 3), dtype=np.uint8)
    mean, std = pixel_statistics(pixels)
    values = pixels.astype(np.float64).reshape(-1, 3) / 255
    assert mean == pytest.approx(values.mean(0), rel=1e-14)
    assert std == pytest.approx(values.std(0), rel=1e-12)
    assert pixel_statistics(pixels[::-1]) == (mean, std)


def test_of_large_data_every_other_image_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.repeat(np.arange(8, dtype=np.uint8), 2).reshape(-1, 1, 1, 1)
    monkeypatch.setattr("pipelines.data.images.inputs._MOST_BYTES", 8)
    assert pixel_statistics(pixels)[0] == (pytest.approx(3.5 / 255),)


def test_what_a_network_sees_has_defaults_of_the_data(data: ImageData) -> None:
    inputs = inputs_of(ImageDataSettings(folder="."), data)
    assert (inputs.transform, inputs.resolution, inputs.channels) == ("small", SIZE, data.train.pixels.shape[3])
    assert (inputs.mean, inputs.std) == pixel_statistics(data.train.pixels)
    assert inputs_of(ImageDataSettings(folder=".", resolution=20, transform="paper"), data).resolution == 20


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mean": (0.5,), "std": (0.2,)}, "have 1 values, but the images of .* have 3 channels: give 3"),
        ({"pad": 16}, "data.pad=16 is not below the resolution, 16 pixels"),
    ],
)
def test_settings_that_do_not_fit_the_data_are_refused(settings: dict[str, object], words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        inputs_of(ImageDataSettings(folder=".", **settings), data_in(tmp_path / "data"))


def test_images_of_one_colour_are_refused_and_of_others_the_shorter_side_counts(tmp_path: Path) -> None:
    pixels, labels = stripes(8)
    black = open_images(write_decoded(tmp_path / "black", dict.fromkeys(("train", "val"), (pixels * 0, labels))))
    with pytest.raises(UsageError, match=r"all pixels of channel 0 have one value.*set data.mean and data.std"):
        inputs_of(ImageDataSettings(folder="."), black)
    wide = dict.fromkeys(("train", "val"), (pixels[:, :12], labels))
    assert (
        inputs_of(ImageDataSettings(folder="."), open_images(write_decoded(tmp_path / "wide", wide))).resolution == 12
    )
