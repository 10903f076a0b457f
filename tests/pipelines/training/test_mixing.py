"""Mixup and CutMix are torchvision's, and depend on seed, step and row of the global batch alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from pipelines.data.images.augmentation import seeded
from pipelines.training.mixing import Mixing

BATCH, CLASSES, SEED = 6, 4, 7
ALPHAS = [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)]


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(BATCH, 3, 8, 8, generator=generator), torch.tensor([0, 1, 2, 3, 0, 2])


def mixed(alphas: tuple[float, float], step: int, size: int = BATCH) -> tuple[Tensor, Tensor]:
    """The whole global batch, in micro-batches of a size."""
    images, labels = batch()
    mixing = Mixing(*alphas, CLASSES, SEED, BATCH)
    parts = []
    for start in range(0, BATCH, size):
        rows = list(mixing.rows(slice(start, start + size)))
        assert len(rows) == size + (size < BATCH)
        parts.append(mixing(images[rows], labels[rows], step, size))
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


@pytest.mark.parametrize("alphas", ALPHAS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_do_not_matter(alphas: tuple[float, float], size: int) -> None:
    for step in range(6):
        for part, whole in zip(mixed(alphas, step, size), mixed(alphas, step), strict=True):
            assert torch.equal(part, whole)


@pytest.mark.parametrize(("alphas", "kind"), [(ALPHAS[0], v2.MixUp), (ALPHAS[1], v2.CutMix)])
def test_the_images_are_torchvision_s(alphas: tuple[float, float], kind: type) -> None:
    before = torch.get_rng_state()
    images, targets = mixed(alphas, 3)
    assert torch.equal(torch.get_rng_state(), before)
    with seeded(SEED, 3, 4):
        expected = v2.RandomChoice([kind(alpha=sum(alphas), num_classes=CLASSES)])(*batch())
    assert torch.equal(images, expected[0])
    assert torch.equal(targets, expected[1])
    torch.testing.assert_close(targets.sum(1), torch.ones(BATCH))


def test_each_step_has_its_own_weight_and_one_of_the_two() -> None:
    original = batch()[0]
    images = [mixed(ALPHAS[2], step)[0] for step in range(12)]
    assert len({each.numpy().tobytes() for each in images}) == 12
    cut = [bool((each == original).flatten(1).any(1).all()) for each in images]
    assert 2 <= sum(cut) <= 10, "whole pixels remain only with CutMix"


def test_the_labels_have_the_weights_of_the_images() -> None:
    images, targets = mixed(ALPHAS[0], 5)
    original, labels = batch()
    weight = float(targets[1, labels[1]])
    assert 0 < weight < 1
    torch.testing.assert_close(images[1], weight * original[1] + (1 - weight) * original[0])
    torch.testing.assert_close(images[0], weight * original[0] + (1 - weight) * original[-1])
    assert float(targets[1, labels[0]]) == pytest.approx(1 - weight)
