"""Random changes are torchvision's, and depend on seed, epoch and image alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from pipelines.data.images.augmentation import Distortion, RandomShift, seeded

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 9, 7, 3), dtype=np.uint8)
ALL = np.arange(len(IMAGES))
FROZEN = [(3, 8, False), (7, 8, True), (0, 7, True)]


def shifted(shift: RandomShift, epoch: int = 0, images: np.ndarray = ALL, pixels: np.ndarray = IMAGES) -> np.ndarray:
    into = np.empty((len(images), *pixels.shape[1:]), np.uint8)
    shift.take(pixels, images, np.full(len(images), epoch), images, into)
    return into


def every_shift(image: np.ndarray, pad: int) -> dict[bytes, tuple[int, int, bool]]:
    """What torchvision makes of an image at each place of the crop, mirrored and not."""
    size = image.shape[:2]
    whole = v2.functional.pad(torch.from_numpy(image).permute(2, 0, 1), [pad], padding_mode="reflect")
    found = {}
    for top in range(2 * pad + 1):
        for left in range(2 * pad + 1):
            crop = v2.functional.crop(whole, top, left, *size)
            for mirrored in (False, True):
                seen = v2.functional.horizontal_flip(crop) if mirrored else crop
                found[seen.permute(1, 2, 0).contiguous().numpy().tobytes()] = (top, left, mirrored)
    return found


@pytest.mark.parametrize("channels", [1, 3])
def test_every_shift_is_a_crop_of_torchvision_and_all_of_them_occur(channels: int) -> None:
    pixels = np.ascontiguousarray(IMAGES[..., :channels])
    shift = RandomShift(pad=1, flip=True, seed=3, count=len(pixels))
    seen = set()
    for epoch in range(20):
        for image, result in zip(pixels, shifted(shift, epoch, pixels=pixels), strict=True):
            seen.add(every_shift(image, 1)[result.tobytes()])
    assert len(seen) == 3 * 3 * 2


def test_without_flip_nothing_is_mirrored_and_without_pad_nothing_moves() -> None:
    results = shifted(RandomShift(2, False, 3, len(IMAGES)))
    found = [every_shift(image, 2)[result.tobytes()] for image, result in zip(IMAGES, results, strict=True)]
    assert not any(mirrored for _, _, mirrored in found)
    assert len({place[:2] for place in found}) > 10
    assert np.array_equal(shifted(RandomShift(0, False, 3, len(IMAGES))), IMAGES)
    flipped = shifted(RandomShift(0, True, 3, len(IMAGES)))
    assert 5 < sum(np.array_equal(one, other) for one, other in zip(flipped, IMAGES, strict=True)) < 35


def test_the_shift_of_an_image_depends_on_seed_epoch_and_image_only() -> None:
    shift = RandomShift(2, True, 3, len(IMAGES))
    some = np.array([30, 2, 17])
    assert np.array_equal(shifted(shift, 5, some), shifted(shift, 5)[some])
    assert not np.array_equal(shifted(shift, 5), shifted(shift, 6))
    assert not np.array_equal(shifted(shift, 5), shifted(RandomShift(2, True, 4, len(IMAGES)), 5))


def test_the_shifts_are_frozen() -> None:
    """A run that is resumed after an upgrade of numpy must see the same images."""
    results = shifted(RandomShift(4, True, 42, 3), 1, ALL[:3])
    found = [every_shift(image, 4)[result.tobytes()] for image, result in zip(IMAGES[:3], results, strict=True)]
    assert found == FROZEN


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("settings", [(2, 9, 0.0), (0, 9, 1.0), (3, 30, 0.5)])
def test_a_distortion_is_torchvision_s_and_depends_on_its_key_only(settings: tuple, channels: int) -> None:
    colour = (10, 20, 30)[:channels]
    distortion = Distortion(*settings, colour)
    image = np.ascontiguousarray(IMAGES[0, :7, :, :channels])
    before = torch.get_rng_state()
    results = [distortion(image, (1, 2, index)) for index in range(8)]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(result.shape == image.shape and result.dtype == np.uint8 for result in results)
    assert len({result.tobytes() for result in results}) > 4
    assert np.array_equal(Distortion(*settings, colour)(image, (1, 2, 5)), results[5])
    operations, magnitude, erasing = settings
    steps = [v2.RandAugment(operations, magnitude)] if operations else []
    steps += [v2.RandomErasing(erasing, value=colour)] if erasing else []
    with seeded(1, 2, 5, 3):
        expected = v2.Compose(steps)(torch.from_numpy(image).permute(2, 0, 1))
    assert np.array_equal(expected.permute(1, 2, 0).numpy(), results[5])


def test_erased_pixels_have_the_colour() -> None:
    image = np.full((16, 16, 3), 200, np.uint8)
    erased = Distortion(0, 9, 1.0, (10, 20, 30))(image, (1, 2, 3))
    changed = erased[(erased != 200).any(2)]
    assert 4 < len(changed) < 200
    assert (changed == (10, 20, 30)).all()
