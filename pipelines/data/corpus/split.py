"""Split a stream of documents into validation and training data, and write both to shards."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from pipelines.data.corpus.encode import EncodedBatch
from pipelines.data.manifest import ShardEntry, SourcePosition, shard_name
from pipelines.data.shards import MAX_SHARD_TOKENS, ShardWriter, WriterState
from pipelines.errors import AsgoError


class SplitWriter:
    """Writes batches of documents to validation shard 0 and to `shards` training shards; a context manager.

    Without `validate_every`, the first `shard_tokens` tokens are validation data. With it, the documents whose number
    is a multiple of it are, until the last training shard is full.
    """

    def __init__(
        self, folder: Path, shards: int, shard_tokens: int, validate_every: int | None, states: Sequence[WriterState]
    ) -> None:
        """Resume from `states`, the result of `checkpoint`, if not empty. Raises `AsgoError` if the files differ."""
        files = [folder / shard_name(index) for index in range(shards + 1)]
        parts = [(files, shard_tokens)]
        if validate_every is not None:
            parts = [(files[:1], MAX_SHARD_TOKENS), (files[1:], shard_tokens)]
        self._validate_every = validate_every
        self.tokens_wanted = len(parts[-1][0]) * shard_tokens
        with ExitStack() as opened:
            self._writers = [
                opened.enter_context(ShardWriter(paths, shard_tokens=capacity, state=state))
                for (paths, capacity), state in zip(parts, states or [WriterState()] * len(parts), strict=True)
            ]
            self._close = opened.pop_all()

    @property
    def tokens(self) -> int:
        """Tokens written, of `tokens_wanted`."""
        return self._writers[-1].tokens

    @property
    def is_full(self) -> bool:
        """Whether the last training shard is complete."""
        return self.tokens == self.tokens_wanted

    @property
    def finished_shards(self) -> int:
        """Number of complete shards."""
        return sum(len(writer.entries) for writer in self._writers)

    def write(self, batch: EncodedBatch, first_document: int) -> None:
        """Append the documents of a batch. `first_document` is the number in the source of the batch's first row."""
        documents = batch.documents + first_document
        if self._validate_every is None:
            self._writers[0].write(batch.tokens, batch.starts, documents)
            return
        validation, training = self._writers
        validates = documents % self._validate_every == 0
        _write_chosen(training, batch, documents, ~validates)
        if self.is_full:  # no validation documents from beyond the last training token
            validates &= documents < training.end.document
        _write_chosen(validation, batch, documents, validates)

    def checkpoint(self) -> tuple[WriterState, ...]:
        """Flush everything written to disk and return the states."""
        return tuple(writer.checkpoint() for writer in self._writers)

    def finish(self) -> tuple[ShardEntry, ...]:
        """Complete the last shards. Raises `AsgoError` if the source is too short for one shard of each part."""
        entries = [entry for writer in self._writers for entry in writer.finish()]
        if len(entries) < 2 or not all(writer.entries for writer in self._writers):
            raise AsgoError(
                f"the source has {sum(entry.tokens for entry in entries):,} tokens, too few for a validation and a "
                "training shard; choose a smaller --shard-tokens and pass --overwrite to start again"
            )
        if self._validate_every is not None:  # after the validation shard comes the first training document, number 1
            entries[0] = entries[0].model_copy(update={"next_start": SourcePosition(document=1, token=0)})
        return tuple(entries)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._close.close()


def _write_chosen(
    writer: ShardWriter, batch: EncodedBatch, documents: NDArray[np.int64], chosen: NDArray[np.bool_]
) -> None:
    """Write the chosen documents of a batch; `documents` and `chosen` have the shape (documents,)."""
    if not chosen.any():
        return
    lengths = np.diff(batch.starts, append=len(batch.tokens))
    kept = lengths[chosen]
    writer.write(batch.tokens[np.repeat(chosen, lengths)], np.cumsum(kept) - kept, documents[chosen])
