"""Batches of token windows whose content is a pure function of the step."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.data.manifest import Manifest, ShardEntry, fingerprint, load_manifest
from pipelines.data.permutation import frozen_permutation
from pipelines.data.shards import open_shard
from pipelines.data.tokenizers import Tokens, build_tokenizer
from pipelines.errors import AsgoError, UsageError


@dataclass(frozen=True, eq=False)
class TokenData:
    """A folder of token shards, open for reading.

    `tokenizer` is what `build_tokenizer` takes; the shards are mapped from disk, each of shape (tokens,).
    """

    folder: Path
    manifest: Manifest
    tokenizer: dict[str, str]
    vocab_size: int
    fingerprint: str
    train: tuple[Tokens, ...]
    validation: Tokens


def open_token_data(folder: Path) -> TokenData:
    """Open a folder that `asgo data` made.

    Raises `UsageError` if it does not exist, and `AsgoError` if the manifest or a shard is missing or damaged.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such data folder; make it with: {_command_that_makes(folder)}")
    manifest = load_manifest(folder)
    vocab_size = build_tokenizer(manifest.tokenizer).vocab_size
    validation, *train = (_open(folder, shard, vocab_size) for shard in manifest.shards)
    return TokenData(
        folder=folder,
        manifest=manifest,
        tokenizer=manifest.tokenizer,
        vocab_size=vocab_size,
        fingerprint=fingerprint(manifest),
        train=tuple(train),
        validation=validation,
    )


class TrainingBatches:
    """The training windows in an order that depends on nothing but `seed`, the batch size and the data.

    A window is `context_length` inputs and one more target inside one shard; inputs do not overlap. Each epoch
    goes through all windows once, in its own order. Global batch `step` (0-based) holds the windows at the places
    `step * batch_size` up to `(step + 1) * batch_size` of that stream, across the end of an epoch too. Processes and
    micro-batches take slices of the same global batch, so their number does not change what is learned from.
    """

    def __init__(self, data: TokenData, context_length: int, batch_size: int, seed: int) -> None:
        """Raises `AsgoError` if no shard is long enough for one window."""
        self._shards = data.train
        self._context_length = context_length
        self._batch_size = batch_size
        self._seed = seed
        self._permutations: dict[int, NDArray[np.int64]] = {}
        windows = [_windows_in(shard, context_length) for shard in self._shards]
        self._first_window = np.cumsum([0, *windows])
        self.windows_per_epoch = int(self._first_window[-1])
        if not self.windows_per_epoch:
            raise _too_short(data, max(map(len, self._shards)), context_length, "training")

    def batch(self, step: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Inputs and targets of some rows of global batch `step`: int64 tensors, (rows, context_length)."""
        first = step * self._batch_size
        windows = self._windows(np.arange(first, first + self._batch_size)[rows])
        shards = np.searchsorted(self._first_window, windows, side="right") - 1
        starts = (windows - self._first_window[shards]) * self._context_length
        tokens = np.empty((len(windows), self._context_length + 1), dtype=np.int64)
        for shard in np.unique(shards):
            here = shards == shard
            tokens[here] = _gather(self._shards[shard], starts[here], self._context_length)
        return _inputs_and_targets(tokens)

    def epoch_at(self, step: int) -> float:
        """How many times the data has been gone through before global batch `step`."""
        return step * self._batch_size / self.windows_per_epoch

    def _windows(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The windows at `positions` of the endless stream of permuted epochs; shapes (rows,)."""
        epochs, places = np.divmod(positions, self.windows_per_epoch)
        windows = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            windows[here] = self._permutation(int(epoch))[places[here]]
        return windows

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._permutations:
            # At most two are kept: micro-batches of one that straddles an epoch's end go to and fro between them.
            self._permutations = {kept: order for kept, order in self._permutations.items() if kept == epoch - 1}
            self._permutations[epoch] = frozen_permutation(self.windows_per_epoch, self._seed, epoch)
        return self._permutations[epoch]


def validation_batches(
    data: TokenData, context_length: int, batch_size: int, batches: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """The same windows each time, evenly spaced over the validation shard: (inputs, targets) as in `TrainingBatches`.

    `batches` batches of `batch_size` windows; all windows, and then a shorter last batch, if there are fewer or
    `batches` is None. Raises `AsgoError`, at once, if the shard is too short for one window.
    """
    available = _windows_in(data.validation, context_length)
    if not available:
        raise _too_short(data, len(data.validation), context_length, "validation")
    count = available if batches is None else min(batches * batch_size, available)
    starts = np.linspace(0, available - 1, count, dtype=np.int64) * context_length
    return (
        _inputs_and_targets(_gather(data.validation, starts[first : first + batch_size], context_length))
        for first in range(0, count, batch_size)
    )


def _command_that_makes(folder: Path) -> str:
    what = "shakespeare" if folder.name == "shakespeare_char" else "text FILE..."
    return f"asgo data {what} --out {shlex.quote(str(folder))}"


def _open(folder: Path, shard: ShardEntry, vocab_size: int) -> Tokens:
    path = folder / shard.file
    if not path.exists():
        raise AsgoError(f"{path}: this shard is missing; make the folder again, or copy the file again")
    tokens = open_shard(path, vocab_size)
    if len(tokens) != shard.tokens:
        raise AsgoError(
            f"{path}: {len(tokens):,} tokens, but the manifest says {shard.tokens:,}; make the folder again"
        )
    return tokens


def _windows_in(shard: Tokens, context_length: int) -> int:
    return (len(shard) - 1) // context_length


def _gather(shard: Tokens, starts: NDArray[np.int64], context_length: int) -> NDArray[np.int64]:
    """Windows of `context_length + 1` tokens from `starts`, (rows, context_length + 1), in one gather."""
    windows = np.lib.stride_tricks.sliding_window_view(shard, context_length + 1)
    return windows[starts].astype(np.int64)


def _inputs_and_targets(tokens: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    windows = torch.from_numpy(tokens)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def _too_short(data: TokenData, tokens: int, context_length: int, part: str) -> AsgoError:
    return AsgoError(
        f"{data.folder}: the longest {part} shard has {tokens:,} tokens, and one window of context length "
        f"{context_length:,} takes {context_length + 1:,}; give more text, or a shorter context"
    )
