"""Makes the tables of docs/precond_frequency.md with `asgo bench optimizers` and `asgo train gpt`, as Markdown."""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def asgo(*arguments: object, **variables: str) -> str:
    """What a command of asgo writes to stdout, with environment variables added."""
    command = [sys.executable, "-m", "asgo_cli", *map(str, arguments)]
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, env=os.environ | variables).stdout


def cost_rows(options: argparse.Namespace) -> list[list[str]]:
    """Mean times of a step over whole periods: the median of single steps would leave the refreshes out."""
    period = max(options.frequencies)
    names = {f: f"{options.optimizer}:precond_frequency={f}" for f in options.frequencies}
    chosen = [f"--optimizer={name}" for name in names.values()]
    repeats = ("--repeats", period * options.periods, "--budget", 86400, "--json")
    report = json.loads(asgo("bench", "optimizers", "--model", options.model, *chosen, *repeats))
    results = {each["name"]: each for each in report["optimizers"]}
    rows = [["frequency", "ms a step", "of frequency 1", "refresh, ms", "other step, ms", "state, bytes a parameter"]]
    for frequency, result in ((f, results[name]) for f, name in names.items()):
        samples, base = result["samples_ms"], results[names[1]]["samples_ms"]
        periods = [slice(start, start + period) for start in range(0, len(samples), period)]
        mean = statistics.median(statistics.fmean(samples[each]) for each in periods)
        shares = [sum(samples[each]) / sum(base[each]) for each in periods]
        share = f"{statistics.median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f})" if frequency != 1 else "1"
        refresh = statistics.median(samples[frequency - 1 :: frequency])  # the bench's first sample is of step 2
        others = [ms for index, ms in enumerate(samples, 1) if index % frequency]
        times = [f"{mean:.1f}", share, f"{refresh:.1f}", f"{statistics.median(others):.1f}" if others else ""]
        rows.append([str(frequency), *times, f"{result['state_bytes_per_parameter']:.2f}"])
    return rows


def loss_rows(options: argparse.Namespace) -> list[list[str]]:
    """Final validation losses over the seeds, and the differences to frequency 1, seed by seed."""
    keys = [(frequency, seed) for seed in options.seeds for frequency in options.frequencies]
    with ThreadPoolExecutor(options.jobs) as pool:
        losses = dict(zip(keys, pool.map(lambda key: final_loss(options, *key), keys), strict=True))
    rows = [["frequency", "validation loss", "deviation", "difference to frequency 1", "its standard error"]]
    for frequency in options.frequencies:
        found = [losses[frequency, seed] for seed in options.seeds]
        differences = [losses[frequency, seed] - losses[1, seed] for seed in options.seeds]
        error = statistics.stdev(differences) / len(differences) ** 0.5
        compared = [f"{statistics.fmean(differences):+.4f}", f"{error:.4f}"] if frequency != 1 else ["", ""]
        rows.append([str(frequency), f"{statistics.fmean(found):.4f}", f"{statistics.stdev(found):.4f}", *compared])
    return rows


def final_loss(options: argparse.Namespace, frequency: int, seed: int) -> float:
    """The last validation loss of a run, in nats a token; a run that was interrupted goes on, a finished one stays."""
    run = options.out / f"{options.optimizer}-f{frequency}-s{seed}"
    overrides = [f"--set={setting}" for setting in (f"optimizer.precond_frequency={frequency}", *options.set)]
    chosen = ("--preset", "tiny", "--optimizer", options.optimizer, "--seed", seed, "--data", options.data)
    asgo("train", "gpt", *chosen, *overrides, "--resume", "--out", run, OMP_NUM_THREADS="1")
    rows = csv.DictReader(asgo("export-metrics", run, "--out", "-").splitlines())
    return [float(row["loss"]) for row in rows if row["split"] == "val"][-1]


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("part", choices=["cost", "loss"])
parser.add_argument("optimizer", choices=["asgo", "shampoo"])
parser.add_argument("--frequencies", type=int, nargs="+", default=[1, 2, 5, 10, 25, 50], help="1, divisors of the last")
parser.add_argument("--model", default="gpt2-layer", help="cost: as the bench takes it")
parser.add_argument("--periods", type=int, default=3, help="cost: times the largest frequency, the steps of each")
parser.add_argument("--data", type=Path, default=Path("data/shakespeare_char"), help="loss: a data folder")
parser.add_argument("--out", type=Path, default=Path("runs/precond_frequency"), help="loss: the folder of the runs")
parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="loss: two or more")
parser.add_argument("--jobs", type=int, default=2, help="loss: runs at a time, with a thread each")
parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="loss: a key of the configuration")
options = parser.parse_args()
header, *rows = cost_rows(options) if options.part == "cost" else loss_rows(options)
print("\n".join(f"| {' | '.join(row)} |" for row in [header, ["---:"] * len(header), *rows]))  # noqa: T201
