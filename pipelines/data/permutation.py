"""Random numbers and shuffling that do not change between releases of numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def frozen_generator(*key: int) -> np.random.RandomState:
    """Return a generator whose numbers depend only on the non-negative integers `key`; trailing zeros do not count.

    Uses numpy's legacy `RandomState`: NEP 19 freezes its streams, while those of `numpy.random.Generator` may change
    with any release. A run resumed after an upgrade, or on another machine, must see the same data.
    """
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(key)))


def frozen_permutation(count: int, *key: int) -> NDArray[np.int64]:
    """Return a random order of 0 .. count-1, shape (count,), which depends only on `key`; see `frozen_generator`."""
    return frozen_generator(*key).permutation(count).astype(np.int64, copy=False)


class EpochStream:
    """An endless stream of the numbers 0 .. count-1: each epoch contains all of them once, in its own order."""

    def __init__(self, count: int, seed: int) -> None:
        self._count = count
        self._seed = seed
        self._orders: dict[int, NDArray[np.int64]] = {}

    def at(self, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the epochs and the numbers at these indices of the stream; all of shape (places,)."""
        epochs, within = np.divmod(places, self._count)
        found = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            found[here] = self._order(int(epoch))[within[here]]
        return epochs, found

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._orders:
            # Keep the neighbors: micro-batches and prefetching alternate between two epochs at an epoch's end.
            self._orders = {kept: order for kept, order in self._orders.items() if abs(kept - epoch) == 1}
            self._orders[epoch] = frozen_permutation(self._count, self._seed, epoch)
        return self._orders[epoch]
