"""Time of a training step with an optimizer of another library: in asgo's loop, and in a plain PyTorch loop.

python docs/measure_imported.py FOLDER torch.Adafactor pytorch_optimizer.Lion    # FOLDER of `asgo data text`
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import torch

from pipelines.benchmarks.plain_gpt import PlainTrainer
from pipelines.benchmarks.trainers import LoopTrainer
from pipelines.config import GPTRunConfig
from pipelines.data.batches import open_token_data
from pipelines.imported_optimizers import import_optimizer
from pipelines.resolve import Layer, preset_layer, resolve

ROUNDS = 60


def main(folder: str, names: list[str]) -> None:
    """Print the medians, and the median over rounds of asgo's time relative to the plain loop's."""
    data, cpu = open_token_data(Path(folder)), torch.device("cpu")
    for name in names:
        layer = Layer("measurement", {"data.folder": folder, "optimizer.name": name, "runtime.device": "cpu"})
        config = resolve([preset_layer("gpt", "tiny"), layer])
        assert isinstance(config, GPTRunConfig)
        ours = LoopTrainer(config, cpu)
        plain = PlainTrainer(config, data.train[0].read(), data.vocab_size, cpu, torch.float32)
        groups = [{**group, "params": list(group["params"])} for group in plain.optimizer.param_groups]
        groups = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in groups]
        plain.optimizer = import_optimizer(name)(groups, lr=config.optimizer.lr)
        pairs = []
        for number in range(ROUNDS + 5):
            in_turn = (ours, plain) if number % 2 else (plain, ours)  # neither is always the first
            laps = {trainer: trainer.step().step_ms for trainer in in_turn}
            pairs.append((laps[ours], laps[plain]))
        pairs = pairs[5:]
        in_asgo, in_plain = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(one / other for one, other in pairs)
        print(f"{name}: asgo {in_asgo:.2f} ms, plain {in_plain:.2f} ms, ratio {ratio:.3f}")  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
