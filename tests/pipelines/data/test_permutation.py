"""Orders are the same for years, and an epoch has everything once."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from pipelines.data import permutation
from pipelines.data.permutation import EpochStream, frozen_permutation


def test_the_order_is_frozen_for_good() -> None:
    # Known values: should numpy or this code ever change them, runs of before could not be resumed.
    assert frozen_permutation(10, 1, 2).tolist() == [1, 6, 4, 8, 3, 7, 5, 0, 2, 9]
    assert frozen_permutation(8, 42).tolist() == [3, 1, 5, 7, 4, 0, 6, 2]
    assert frozen_permutation(0, 42).tolist() == []


def test_the_stream_is_one_order_an_epoch_whatever_is_asked_for_before() -> None:
    whole = [place for epoch in range(5) for place in frozen_permutation(7, 3, epoch).tolist()]
    stream = EpochStream(7, 3)
    for places in (np.arange(35), np.array([20, 6, 7, 13, 14, 0]), np.array([34]), np.array([0]), np.arange(0)):
        epochs, found = stream.at(places)
        assert epochs.tolist() == [place // 7 for place in places]
        assert found.tolist() == [whole[place] for place in places]


def test_each_order_is_made_once_by_whoever_looks_a_little_ahead_and_two_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[int] = []

    def counted(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
        made.append(epoch)
        return frozen_permutation(count, seed, epoch)

    monkeypatch.setattr(permutation, "frozen_permutation", counted)
    stream = EpochStream(10, 0)
    for first in range(0, 192, 4):
        stream.at(np.arange(first + 4, first + 8))
        stream.at(np.arange(first, first + 4))
        assert len(stream._orders) <= 2
    assert made == list(range(20))
