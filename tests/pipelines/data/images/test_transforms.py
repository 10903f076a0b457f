"""A network sees what it would see through torchvision's transforms, within a stated bound or to the bit."""

from __future__ import annotations

import functools
import io
import math

import numpy as np
import pytest
import torch
from matplotlib import cbook
from PIL import Image
from torchvision import transforms as reference
from torchvision.transforms import functional

from pipelines.data.images.decode import EncodedImage, Pixels
from pipelines.data.images.transforms import (
    MEAN,
    STD,
    CentreCrop,
    Normalize,
    RandomCrop,
    Transform,
    View,
    build_transforms,
    render,
)

SIZES = [(500, 375), (375, 500), (333, 251), (208, 208), (640, 209), (100, 60), (61, 240)]


@functools.cache
def photograph(width: int, height: int, part: int = 0) -> bytes:
    """A JPEG of this size, cut out of matplotlib's photograph after making that larger or smaller."""
    whole = Image.open(cbook.get_sample_data("grace_hopper.jpg")).convert("RGB")
    scale = max(width / whole.width, height / whole.height) * (1 + part / 2)
    whole = whole.resize((math.ceil(scale * whole.width), math.ceil(scale * whole.height)), Image.Resampling.LANCZOS)
    left, top = (whole.width - width) // (1 + part), (whole.height - height) // (1 + part)
    file = io.BytesIO()
    whole.crop((left, top, left + width, top + height)).save(file, "JPEG", quality=95)
    return file.getvalue()


class Watched(EncodedImage):
    """Remembers how much smaller it was decoded."""

    shrink = 1

    def __init__(self, data: bytes) -> None:
        super().__init__(data, "photograph.JPEG")

    def pixels(self, shrink: int = 1) -> Pixels:
        self.shrink = shrink
        return super().pixels(shrink)


def seen(transform: Transform, data: bytes, key: tuple[int, ...] = (0, 0, 0), exact: bool = False) -> Pixels:
    image = Watched(data)
    return render(image, transform.view(image.height, image.width, key), exact=exact)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_centre_is_exactly_torchvisions(size: tuple[int, int]):
    data = photograph(*size)
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    for transform, chain in (
        (build_transforms("paper", 208)[1], [reference.Resize(208), reference.CenterCrop(208)]),
        (build_transforms("standard", 224)[1], [reference.Resize(256), reference.CenterCrop(224)]),
        (build_transforms("standard", 33)[1], [reference.Resize(37), reference.CenterCrop(33)]),
    ):
        expected = reference.Compose(chain)(picture)
        np.testing.assert_array_equal(seen(transform, data, exact=True), np.asarray(expected))
    assert build_transforms("paper", 208)[0] == build_transforms("paper", 208)[1] == CentreCrop(208, 208)


@pytest.mark.parametrize("size", [(500, 375), (100, 60), (1000, 900)], ids=str)
def test_a_random_part_is_exactly_torchvisions(size: tuple[int, int]):
    data = photograph(*size)
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    transform = build_transforms("standard", 224)[0]
    mirrored = set()
    for index in range(5):
        view = transform.view(size[1], size[0], (1, 0, index))
        left, top, right, bottom = view.box
        expected = functional.resized_crop(picture, top, left, bottom - top, right - left, [224, 224])
        expected = functional.hflip(expected) if view.mirrored else expected
        np.testing.assert_array_equal(seen(transform, data, (1, 0, index), exact=True), np.asarray(expected))
        mirrored.add(view.mirrored)
    assert mirrored == {True, False}


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_fast_resizing_differs_by_one_in_few_places(size: tuple[int, int]):
    data = photograph(*size)
    for transform in (CentreCrop(208, 208), CentreCrop(256, 224), RandomCrop(224)):
        difference = np.abs(seen(transform, data).astype(int) - seen(transform, data, exact=True))
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.005


def differences(transform: Transform, size: tuple[int, int], shrink: int) -> list[tuple[float, int]]:
    """Mean and largest difference for the images that are decoded so much smaller."""
    found = []
    for part in range(4):
        image = Watched(photograph(*size, part))
        view = transform.view(image.height, image.width, (0, 0, part))
        difference = np.abs(render(image, view).astype(int) - render(image, view, exact=True))
        if image.shrink == shrink:
            found.append((float(difference.mean()), int(difference.max())))
    return found


@pytest.mark.parametrize(
    ("transform", "size", "shrink"),
    [
        (CentreCrop(208, 208), (1200, 899), 2),
        (CentreCrop(93, 93), (375, 501), 2),
        (CentreCrop(104, 104), (1111, 850), 4),
        (CentreCrop(37, 32), (899, 603), 8),
        (RandomCrop(48), (601, 499), 2),
        (RandomCrop(48), (1201, 999), 4),
    ],
    ids=str,
)
def test_decoding_at_a_fraction_of_the_size_stays_within_the_stated_bound(
    transform: Transform, size: tuple[int, int], shrink: int
):
    found = differences(transform, size, shrink)
    assert found
    assert all(mean < 1.5 and largest <= 16 for mean, largest in found)


@pytest.mark.parametrize(("size", "shrink"), [((1000, 827), 1), ((1000, 832), 2), ((4000, 2000), 4)])
def test_twice_the_pixels_that_are_wanted_are_decoded(size: tuple[int, int], shrink: int):
    image = Watched(photograph(*size))
    view = CentreCrop(208, 208).view(image.height, image.width, ())
    render(image, view)
    assert image.shrink == shrink
    image.shrink = 1
    render(image, view, exact=True)
    assert image.shrink == 1


def test_a_random_view_depends_on_its_key_alone_and_is_the_same_for_years():
    transform = RandomCrop(224)
    assert transform.view(375, 500, (1, 2, 3)) == View((90, 9, 442, 370), (224, 224), (0, 0), 224, mirrored=True)
    keys = [(seed, epoch, index) for seed in range(3) for epoch in range(3) for index in range(3)]
    views = {key: transform.view(375, 500, key) for key in keys}
    assert len({view.box for view in views.values()}) == len(keys)
    assert all(transform.view(375, 500, key) == views[key] for key in reversed(keys))


def test_random_parts_are_drawn_as_torchvision_draws_them():
    torch.manual_seed(0)
    blank = torch.empty(3, 375, 500)
    theirs = [
        reference.RandomResizedCrop.get_params(blank, [0.08, 1.0], [3 / 4, 4 / 3])  # top, left, height, width
        for _ in range(3000)
    ]
    views = [RandomCrop(224).view(375, 500, (0, 0, index)) for index in range(3000)]
    boxes = np.array([view.box for view in views], dtype=float)
    ours = np.stack([boxes[:, 1], boxes[:, 0], boxes[:, 3] - boxes[:, 1], boxes[:, 2] - boxes[:, 0]], 1)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2] <= 500).all()
    assert (boxes[:, 3] <= 375).all()
    for quantile in (0.1, 0.5, 0.9):
        np.testing.assert_allclose(np.quantile(ours, quantile, 0), np.quantile(theirs, quantile, 0), atol=15)
    assert abs(np.mean([view.mirrored for view in views]) - 0.5) < 0.03


@pytest.mark.parametrize("size", [(30, 900), (900, 30)])
def test_of_a_long_and_narrow_image_the_middle_is_taken_as_by_torchvision(size: tuple[int, int]):
    expected = reference.RandomResizedCrop.get_params(torch.empty(3, *size), [0.9, 1.0], [3 / 4, 4 / 3])
    boxes = [RandomCrop(224).view(*size, (0, 0, index)).box for index in range(50)]
    left, top, right, bottom = max(set(boxes), key=boxes.count)
    assert (top, left, bottom - top, right - left) == expected


@pytest.mark.parametrize("channels_last", [False, True])
def test_normalizing_is_to_the_bit_what_torchvision_does(channels_last: bool):
    data = photograph(500, 375)
    pixels = seen(CentreCrop(208, 208), data, exact=True)
    batch = torch.from_numpy(np.stack([pixels, pixels[::-1]])).permute(0, 3, 1, 2)
    chain = reference.Compose([reference.ToTensor(), reference.Normalize(MEAN, STD)])
    values = Normalize(channels_last=channels_last)(batch)
    assert torch.equal(values[0], chain(Image.fromarray(pixels)))
    assert values.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert batch.dtype == torch.uint8
