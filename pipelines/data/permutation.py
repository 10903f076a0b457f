"""Shuffling that stays the same for years."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def frozen_permutation(count: int, *key: int) -> NDArray[np.int64]:
    """A random order of 0 .. count-1, decided by the non-negative integers `key` alone; shape (count,).

    It uses numpy's legacy `RandomState`, because NEP 19 freezes its streams for good, whereas those of
    `numpy.random.Generator` may change with any release: a run resumed after an upgrade, or on another
    machine, must see the same data.
    """
    generator = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(key)))
    return generator.permutation(count).astype(np.int64, copy=False)


class EpochStream:
    """0 .. count-1 over and over without an end: each epoch has all of them once, in an order of its own."""

    def __init__(self, count: int, seed: int) -> None:
        self._count = count
        self._seed = seed
        self._orders: dict[int, NDArray[np.int64]] = {}

    def at(self, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The epochs that some places of the stream are in, and what stands there; all of shape (places,)."""
        epochs, within = np.divmod(places, self._count)
        found = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            found[here] = self._order(int(epoch))[within[here]]
        return epochs, found

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._orders:
            # Micro-batches, and looking ahead, go to and fro across an epoch's end.
            self._orders = {kept: order for kept, order in self._orders.items() if abs(kept - epoch) == 1}
            self._orders[epoch] = frozen_permutation(self._count, self._seed, epoch)
        return self._orders[epoch]
