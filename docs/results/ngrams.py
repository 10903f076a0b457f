"""Write the validation losses of a bigram and a trigram model, with which the pages compare their losses.

`python docs/results/ngrams.py OUT.md NAME=FOLDER...`, with folders of token shards that have one training shard. The
bigram model adds 1 to each count. The trigram model adds 10 times the bigram model's probability to each count.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.data.manifest import shard_name
from pipelines.data.shards import open_shard

VOCABULARY = 2**16
"""As many tokens as a shard can distinguish."""


def ngram_losses(train: NDArray[np.integer], validation: NDArray[np.integer]) -> tuple[float, float]:
    """Return the mean losses, in nats a token, of the bigram and the trigram model. Both inputs: (tokens,)."""
    alphabet, tokens = np.unique(np.concatenate([train, validation]), return_inverse=True)
    size = len(alphabet)
    first, second, third = (tokens[start : len(train) - 2 + start] for start in range(3))
    pairs = np.bincount(tokens[: len(train) - 1] * size + tokens[1 : len(train)], minlength=size**2)
    triples = np.bincount((first * size + second) * size + third, minlength=size**3)
    bigram = pairs.reshape(size, size) + 1.0
    bigram /= bigram.sum(1, keepdims=True)
    trigram = triples.reshape(size, size, size) + 10.0 * bigram
    trigram /= trigram.sum(2, keepdims=True)
    first, second, third = (tokens[len(train) + start : len(tokens) - 2 + start] for start in range(3))
    return float(-np.log(bigram[second, third]).mean()), float(-np.log(trigram[first, second, third]).mean())


def main(out: Path, folders: dict[str, Path]) -> None:
    """Write a row for each folder."""
    lines = ["| validation loss | bigram model | trigram model |", "| --- | ---: | ---: |"]
    for name, folder in folders.items():
        validation, train = (open_shard(folder / shard_name(index), VOCABULARY).read() for index in range(2))
        bigram, trigram = ngram_losses(train, validation)
        lines.append(f"| {name} | {bigram:.2f} | {trigram:.2f} |")
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), {name: Path(folder) for name, folder in (each.split("=", 1) for each in sys.argv[2:])})
