"""Keys and values of earlier positions, kept while a decoder generates."""

from __future__ import annotations

from torch import Tensor


class LayerCache:
    """Keys and values of one attention layer, in memory for `capacity` positions from the first call on."""

    def __init__(self, capacity: int) -> None:
        self.length = 0
        self._capacity = capacity
        self._kept: tuple[Tensor, Tensor] | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append new positions, each (batch, heads, new, d_head); returns all: (batch, heads, length, d_head)."""
        assert self.length == 0 or keys.shape[2] == 1  # attention masks nothing after the prompt
        if self._kept is None:
            batch, heads, _, d_head = keys.shape
            shape = (batch, heads, self._capacity, d_head)
            self._kept = keys.new_empty(shape), values.new_empty(shape)
        start, self.length = self.length, self.length + keys.shape[2]
        for kept, new in zip(self._kept, (keys, values), strict=True):
            kept[:, :, start : self.length] = new
        all_keys, all_values = (kept[:, :, : self.length] for kept in self._kept)
        return all_keys, all_values


class KeyValueCache:
    """A `LayerCache` for each layer. A decoder takes it as the second argument of `forward`.

    The first call takes the prompt, each later one a single token: its query may see every key, so no mask is needed.
    """

    def __init__(self, n_layers: int, capacity: int) -> None:
        self.layers = [LayerCache(capacity) for _ in range(n_layers)]

    @property
    def length(self) -> int:
        """Number of positions so far."""
        return self.layers[0].length
