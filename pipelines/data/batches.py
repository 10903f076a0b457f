"""Batches of token windows whose content is a pure function of the step."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.config import DataOrder
from pipelines.data.foreign import open_foreign_tokens
from pipelines.data.manifest import MANIFEST, UNFINISHED, ShardEntry, fingerprint, load_manifest
from pipelines.data.permutation import EpochStream
from pipelines.data.shards import TokenFile, allow_open_files, open_shard
from pipelines.data.tokenizers import Gpt2Tokenizer, build_tokenizer
from pipelines.errors import AsgoError, UsageError
from pipelines.shell import command

_TOKENS_AT_ONCE = 1 << 12


@dataclass(frozen=True, eq=False)
class TokenData:
    """A folder of token shards, open for reading.

    `tokenizer` is the argument of `build_tokenizer`. The `fingerprint` depends on the data, not on the folder's path.
    """

    folder: Path
    tokenizer: dict[str, str]
    vocab_size: int
    fingerprint: str
    train: tuple[TokenFile, ...]
    validation: tuple[TokenFile, ...]


def open_token_data(folder: Path) -> TokenData:
    """Open a folder that `asgo data`, llm.c, modded-nanogpt or nanoGPT wrote.

    Raises `UsageError` if it does not exist, and `AsgoError` if it is unfinished, or if the manifest or a shard is
    missing or damaged.
    """
    if folder.is_file():
        raise UsageError(f"{folder}: this is a file; {_advice_on_file(folder)}")
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such data folder; make it with: {_command_that_makes(folder)}")
    if not _has_manifest(folder):
        return _open_without_manifest(folder)
    manifest = load_manifest(folder)
    vocab_size = build_tokenizer(manifest.tokenizer).vocab_size
    allow_open_files(len(manifest.shards))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        validation, *train = pool.map(lambda shard: _open(folder, shard, vocab_size), manifest.shards)
    return TokenData(
        folder=folder,
        tokenizer=manifest.tokenizer,
        vocab_size=vocab_size,
        fingerprint=fingerprint(manifest),
        train=tuple(train),
        validation=(validation,),
    )


def vocab_size_of(folder: Path) -> int:
    """Return the number of symbols of a folder's tokenizer. Opens no shards if there is a manifest.

    Raises like `open_token_data`.
    """
    if _has_manifest(folder):
        return build_tokenizer(load_manifest(folder).tokenizer).vocab_size
    return open_token_data(folder).vocab_size


def _has_manifest(folder: Path) -> bool:
    return any((folder / name).exists() for name in (MANIFEST, UNFINISHED))


def _open_without_manifest(folder: Path) -> TokenData:
    tokens = open_foreign_tokens(folder)
    return TokenData(
        folder=folder,
        tokenizer={"name": Gpt2Tokenizer.name},
        vocab_size=Gpt2Tokenizer.vocab_size,
        fingerprint=tokens.fingerprint,
        train=tokens.train,
        validation=tokens.validation,
    )


class TrainingBatches:
    """The training windows, in an order that depends only on `order`, `seed`, the batch size and the data.

    A window is `context_length + 1` consecutive tokens of one shard: the inputs, and the targets one token later.
    Inputs do not overlap. Global batch `step` (0-based) holds the windows `step * batch_size` up to
    `(step + 1) * batch_size` of an endless stream of epochs. Ranks and micro-batches take slices of the same global
    batch, so their number does not change the training data.

    "shuffled": each epoch contains all windows once, in its own order. "sequential": each epoch contains them in the
    order of the shards, without those at the end of a shard that do not fill a batch, as modded-nanogpt reads shards;
    `seed` has no effect.
    """

    def __init__(
        self,
        data: TokenData,
        context_length: int,
        batch_size: int,
        seed: int,
        *,
        order: DataOrder = "shuffled",
        pinned: bool = False,
    ) -> None:
        """With `pinned`, batches are in pinned memory, so copies to a CUDA device can be asynchronous.

        Raises `AsgoError` if no shard is long enough for one window, or, if "sequential", for one batch.
        """
        at_once = batch_size if order == "sequential" else 1
        self._windows = _Windows(data.train, context_length, pinned, at_once)
        self._batch_size = batch_size
        self._stream = EpochStream(self._windows.count, seed) if order == "shuffled" else None
        self.windows_per_epoch = self._windows.count
        if not self.windows_per_epoch:
            raise _too_short(data.folder, data.train, context_length, "training", at_once)

    def batch(self, step: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of the given rows of global batch `step`: int64 tensors, (rows, context_length)."""
        first = step * self._batch_size
        places = np.arange(first, first + self._batch_size)[rows]
        return self._windows.read(self._stream.at(places)[1] if self._stream else places % self.windows_per_epoch)

    def epoch_at(self, step: int) -> float:
        """Return the epochs completed before global batch `step`, with a fraction."""
        return step * self._batch_size / self.windows_per_epoch


class ValidationBatches:
    """A fixed set of windows of the validation shards; `len` is their number."""

    def __init__(
        self,
        data: TokenData,
        context_length: int,
        count: int | None,
        *,
        from_start: bool = False,
        pinned: bool = False,
    ) -> None:
        """Choose `count` evenly spaced windows, or all if there are fewer or `count` is None.

        With `from_start`, choose exactly the first `count`. Raises `AsgoError` if there are fewer, or if no shard is
        long enough for one window.
        """
        self._windows = _Windows(data.validation, context_length, pinned)
        available = self._windows.count
        if not available:
            raise _too_short(data.folder, data.validation, context_length, "validation")
        chosen = available if count is None else min(count, available)
        if from_start and count is not None and count > available:
            raise AsgoError(
                f"{data.folder}: its validation shards have {available * context_length:,} tokens in windows of "
                f"context length {context_length:,}, and evaluation.tokens is {count * context_length:,}; lower it"
            )
        self._chosen = np.linspace(0, (chosen if from_start else available) - 1, chosen, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._chosen)

    def read(self, places: range) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of the windows with these indices, shaped as in `TrainingBatches.batch`."""
        return self._windows.read(self._chosen[places.start : places.stop])


class _Windows:
    """The windows of several shards, numbered from the start of the first shard to the end of the last.

    Each shard has a multiple of `multiple` windows: the last ones may be left out.
    """

    def __init__(self, shards: Sequence[TokenFile], context_length: int, pinned: bool, multiple: int = 1) -> None:
        self._shards = shards
        self._context_length = context_length
        self._pinned = pinned
        self._at_once = max(1, _TOKENS_AT_ONCE // context_length)
        counts = ((len(shard) - 1) // (multiple * context_length) * multiple for shard in shards)
        self._first = np.cumsum([0, *counts])
        self.count = int(self._first[-1])

    def read(self, windows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of the windows (rows,): int64 tensors, (rows, context_length)."""
        shards = np.searchsorted(self._first, windows, side="right") - 1
        starts = (windows - self._first[shards]) * self._context_length
        places = list(zip(shards.tolist(), starts.tolist(), strict=True))
        shape = (len(windows), self._context_length)
        inputs, targets = (torch.empty(shape, dtype=torch.int64, pin_memory=self._pinned) for _ in range(2))
        # A few windows at a time: the uint16 buffer stays in the CPU cache.
        tokens = np.empty((self._at_once, self._context_length + 1), dtype=np.uint16)
        for first in range(0, len(places), self._at_once):
            chunk = places[first : first + self._at_once]
            for row, (shard, start) in zip(tokens, chunk, strict=False):
                self._shards[shard].read_into(row, start)
            rows = slice(first, first + len(chunk))
            inputs.numpy()[rows] = tokens[: len(chunk), :-1]
            targets.numpy()[rows] = tokens[: len(chunk), 1:]
        return inputs, targets


def _advice_on_file(file: Path) -> str:
    if file.suffix == ".bin":
        return f"pass its folder: {command('--data', file.parent)}"
    return f"tokenize its text with: {command('asgo', 'data', 'text', file, '--out', 'FOLDER')}"


def _command_that_makes(folder: Path) -> str:
    known = {"shakespeare_char": "shakespeare", "fineweb": "fineweb", "openwebtext": "openwebtext"}
    what = known.get(folder.name, "text FILE...")
    return f"asgo data {what} {command('--out', folder)}"


def _open(folder: Path, shard: ShardEntry, vocab_size: int) -> TokenFile:
    path = folder / shard.file
    if not path.exists():
        raise AsgoError(f"{path}: this shard is missing; make the folder again, or copy the file again")
    tokens = open_shard(path, vocab_size)
    if len(tokens) != shard.tokens:
        raise AsgoError(
            f"{path}: {len(tokens):,} tokens, but the manifest says {shard.tokens:,}; make the folder again"
        )
    return tokens


def _too_short(
    folder: Path, shards: Sequence[TokenFile], context_length: int, part: str, windows: int = 1
) -> AsgoError:
    needing = "one window" if windows == 1 else f"one batch of {windows:,} windows in sequential order,"
    remedy = "shorter context" if windows == 1 else "smaller batch"
    return AsgoError(
        f"{folder}: the longest {part} shard has {max(map(len, shards)):,} tokens, and {needing} of context length "
        f"{context_length:,} needs {windows * context_length + 1:,}; use more text or a {remedy}"
    )
