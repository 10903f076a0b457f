"""Measures `asgo compare` on made-up runs, or logs, of real size: seconds and peak memory, for one and for many.

python docs/measure_compare.py --runs 100 --steps 50000      # about 1.2 GB of metrics, in a temporary folder
python docs/measure_compare.py --logs                        # the same as CSV files of other programs
python docs/measure_compare.py --runs 18 --keep /tmp/made    # keeps the runs and the report, to look at
"""

import argparse
import csv
import math
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pipelines.config import RunConfig
from pipelines.resolve import Layer, preset_layer, resolve
from pipelines.training.metrics import Row, to_lines
from pipelines.training.run_folder import RunFolder

OPTIMIZERS = (
    "asgo", "muon", "accasro", "asro", "adamw", "dasgo", "shampoo",
    "adam", "amsgrad", "radam", "rmsprop", "adagrad", "sgd-nesterov", "sgd-momentum",
)  # fmt: skip
"""The first learns fastest here, the last slowest."""
VALIDATIONS = 50


def configuration(optimizer: str, seed: int, steps: int) -> RunConfig:
    """The preset `tiny` with another length."""
    settings = {
        "optimizer.name": optimizer,
        "seed": seed,
        "training.steps": steps,
        "evaluation.every": steps // VALIDATIONS,
    }
    return resolve([preset_layer("gpt", "tiny"), Layer("made up", settings)])


def rows(config: RunConfig) -> Iterator[Row]:
    """Losses that fall as a power of the step, with noise and a few spikes, and a validation now and then."""
    rank, steps = OPTIMIZERS.index(config.optimizer.name), config.training.steps
    chance = random.Random(f"{rank} {config.seed}")
    tokens = config.training.batch_size * 128
    step_ms, optimizer_ms = 30 + 2 * rank, 9 / (rank + 1)
    floor = 3.2 + 0.01 * rank**1.5 + chance.gauss(0, 0.006)
    for step in range(steps + 1):
        loss = floor + 7.7 / math.sqrt(1 + 400 * step / steps * (1 - rank / 20))
        counts = {
            "step": step, "tokens": tokens * step, "samples": config.training.batch_size * step, "epoch": step / steps,
            "elapsed_s": step * step_ms / 1000,
        }  # fmt: skip
        if step:
            spike = 2.0 if chance.random() < 1e-4 else 0.0
            yield Row(
                **counts, split="train", loss=loss + chance.gauss(0, 0.05) + spike, lr=config.optimizer.lr,
                grad_norm=1 + chance.random(), step_ms=step_ms + chance.random(), optimizer_ms=optimizer_ms,
                throughput=tokens / step_ms * 1000,
            )  # fmt: skip
        if step % (steps // VALIDATIONS) == 0 or step == steps:
            yield Row(**counts, split="val", loss=loss)


def make_runs(root: Path, count: int, steps: int, as_logs: bool) -> None:
    """Runs, or CSV files, with as few seeds as so many optimizers leave."""
    root.mkdir(parents=True)
    for index in range(count):
        seed, rank = divmod(index, min(len(OPTIMIZERS), max(1, math.ceil(count / 3))))
        config = configuration(OPTIMIZERS[rank], seed, steps)
        if as_logs:
            write_log(root / f"{OPTIMIZERS[rank]}-s{seed}.csv", config)
            continue
        folder = RunFolder(root / f"{OPTIMIZERS[rank]}-s{seed}")
        folder.begin(config, {"kind": "made up"}, "cpu")
        folder.metrics_path.write_bytes(to_lines(rows(config)))


def write_log(path: Path, config: RunConfig) -> None:
    """A CSV with the columns of `asgo export-metrics`, without those that name the run."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(Row.__annotations__))
        writer.writeheader()
        writer.writerows(dict(row) for row in rows(config))


def compare(root: Path) -> None:
    """Run the command; say how long it took, and how much memory at most."""
    command = [sys.executable, "-m", "asgo_cli", "compare", str(root / "runs"), "--out", str(root / "report")]
    before = time.monotonic()
    subprocess.run(command, check=True)
    seconds = time.monotonic() - before
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    page = (root / "report" / "index.html").stat().st_size / 1e6
    print(  # noqa: T201
        f"{seconds:.1f} s ({used.ru_utime + used.ru_stime:.1f} s of processor time), "
        f"{used.ru_maxrss / 1024:,.0f} MB of memory at most; the page has {page:.1f} MB"
    )


def main() -> None:
    """Parse the options, make the runs, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--logs", action="store_true", help="CSV files instead of run folders")
    parser.add_argument("--keep", type=Path, help="a new folder for the runs and the report")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="asgo-compare-") as temporary:
        root = options.keep or Path(temporary)
        make_runs(root / "runs", options.runs, options.steps, options.logs)
        compare(root)


if __name__ == "__main__":
    main()
