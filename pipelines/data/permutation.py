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
