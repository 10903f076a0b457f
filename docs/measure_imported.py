"""Time of a training step with an optimizer of another library: in asgo's loop, and in a plain PyTorch loop.

python docs/measure_imported.py FOLDER torch.Adafactor pytorch_optimizer.Lion    # FOLDER of `asgo data text`

Both train the same model on the same batches, and clip gradients. Each round makes one step of each, in turn.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from models.gpt import next_token_loss
from pipelines.benchmarks.trainers import LoopTrainer
from pipelines.config import GPTRunConfig
from pipelines.data.batches import TrainingBatches, open_token_data
from pipelines.imported_optimizers import import_optimizer
from pipelines.resolve import Layer, preset_layer, resolve
from pipelines.training.gpt_task import build_decoder

ROUNDS = 200


def plain_step(config: GPTRunConfig) -> Callable[[int], None]:
    """Return a function that makes a step, as one would write it without asgo."""
    data = open_token_data(Path(config.data.folder))
    training, length = config.training, config.model.context_length
    batches = TrainingBatches(data, length, training.batch_size, config.seed)
    model = build_decoder(config.model, data.vocab_size)
    optimizer = import_optimizer(config.optimizer.name)(model.parameters(), lr=config.optimizer.lr)

    def step(number: int) -> None:
        inputs, targets = batches.batch(number)
        loss = next_token_loss(model(inputs), targets)
        loss.backward()
        assert training.max_grad_norm is not None
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


def main(folder: str, names: list[str]) -> None:
    """Print the medians, and the median over rounds of asgo's time relative to the plain loop's."""
    for name in names:
        layer = Layer("measurement", {"data.folder": folder, "optimizer.name": name, "runtime.device": "cpu"})
        config = resolve([preset_layer("gpt", "tiny"), layer])
        assert isinstance(config, GPTRunConfig)
        trainer, plain = LoopTrainer(config, torch.device("cpu")), plain_step(config)
        pairs = []
        for number in range(ROUNDS):
            seconds = {}
            steps = [("asgo", trainer.step), ("plain", partial(plain, number))]
            for key, step in steps if number % 2 else steps[::-1]:  # neither is always the first
                began = time.perf_counter()
                step()
                seconds[key] = time.perf_counter() - began
            pairs.append((seconds["asgo"], seconds["plain"]))
        pairs = pairs[ROUNDS // 10 :]
        ours, theirs = (1e3 * statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(one / other for one, other in pairs)
        print(f"{name}: asgo {ours:.2f} ms, plain {theirs:.2f} ms, ratio {ratio:.3f}")  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
