"""Records what `asgo` does, so that two versions of the code can be compared after a refactoring.

python -m tests.unchanged OLD                  # in a checkout of the old version: writes the record into OLD
python -m tests.unchanged NEW --before OLD     # in the new one: prints each difference; exits 1 if there is one

The record holds the configuration of every preset with every optimizer, every help text, the checkpoints and metrics of
six-step runs of every optimizer on text and on images, and `asgo compare --json`. The new version also resumes the old
version's checkpoints, and compares the old version's runs.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from asgo_cli.names import OPTIMIZERS
from pipelines.storage import sha256_of
from pipelines.tasks import TASKS
from tests.command_lines import tree
from tests.conftest import WORDS
from tests.pipelines.data.imagenet.archive_makers import pictures, write_archives

TIMES = ("step_ms", "optimizer_ms", "throughput", "elapsed_s")
COMMON = {
    "training.steps": 6, "evaluation.every": 3, "checkpoint.every": 3, "checkpoint.keep": 9, "training.ema_decay": 0.9,
    "runtime.device": "cpu",
}  # fmt: skip
SMALL = {
    "gpt": {
        "model.context_length": 16, "model.n_layers": 2, "model.n_heads": 2, "model.d_model": 32, "model.d_ff": 64,
        "model.dropout": 0.1, "training.batch_size": 4, "evaluation.batches": 2,
    },
    "images": {
        "model.name": "squeezenet1_1", "data.resolution": 32, "training.batch_size": 8, "runtime.workers": 1,
    },
}  # fmt: skip
REQUIRED = {
    "asro": {"decrement": 0.001, "min_scale": 0.1},
    "accasro": {"increment": 4.0, "decrement": 0.9, "max_scale": 5.0, "min_scale": 0.1},
}
"""Settings that have no default, for a preset that does not give them."""


def asgo(*words: object, cwd: Path) -> str:
    """What a command prints on stdout; its errors, where it fails. Names of folders below `cwd` do not appear in it."""
    command = [sys.executable, "-m", "asgo_cli", *map(str, words)]
    paths = os.pathsep.join([str(Path.cwd()), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else f"exit {done.returncode}: {done.stdout}{done.stderr}"


def settings_of(table: dict[str, object]) -> list[str]:
    return [f"--set={key}={value}" for key, value in table.items()]


def configuration(task: str, preset: str, optimizer: str, cwd: Path) -> str:
    words = ("train", task, "--preset", preset, "--optimizer", optimizer)
    printed = asgo(*words, "--print-config", cwd=cwd)
    if printed.startswith("exit 2") and optimizer in REQUIRED:
        given = settings_of({f"optimizer.{key}": value for key, value in REQUIRED[optimizer].items()})
        printed = asgo(*words, "--lr=0.001", *given, "--print-config", cwd=cwd)
    elif printed.startswith("exit 2"):
        printed = asgo(*words, "--lr=0.001", "--print-config", cwd=cwd)
    return printed


def make_data(cwd: Path) -> None:
    """The same bytes of text and of images every time."""
    (cwd / "text.txt").write_text(" ".join(random.Random(0).choices(WORDS, k=3000)), encoding="utf-8")
    asgo("data", "text", "text.txt", "--tokenizer", "chars", "--val-fraction", 0.1, "--out", "data-gpt", cwd=cwd)
    write_archives(cwd / "archives", pictures(4, 24, 8, (64, 48)), kit="map_clsloc.txt")
    asgo("data", "imagenet", "--archives", "archives", "--no-extract", "--out", "data-images", cwd=cwd)


def run(task: str, optimizer: str, cwd: Path) -> str:
    """Train for six steps; returns what `outcome` does."""
    preset = "tiny" if task == "gpt" else "asro-imagenet"
    table = {**COMMON, **SMALL[task]}
    given = REQUIRED.get(optimizer, {})
    table |= {f"optimizer.{key}": value for key, value in given.items()}
    out = f"runs-{task}/{optimizer}"
    words = ("--preset", preset, "--optimizer", optimizer, "--data", f"data-{task}", "--lr", 0.01, "--out", out)
    failure = asgo("train", task, *words, *settings_of(table), cwd=cwd)
    return failure + outcome(cwd / out)


def outcome(folder: Path) -> str:
    """SHA-256 of every tensor file of every checkpoint but the metrics, and the metrics without times."""
    lines = [
        f"{path.relative_to(folder)} {sha256_of(path)}"
        for path in sorted(folder.glob("checkpoints/*/*.safetensors"))
        if path.stem != "history"
    ]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines += [json.dumps({key: value for key, value in row.items() if key not in TIMES}) for row in rows]
    return "\n".join(lines)


def resumed(task: str, optimizer: str, old: Path, cwd: Path) -> str:
    """What `outcome` gives of an old run that loses its last checkpoint, and is resumed."""
    out = f"resumed-{task}/{optimizer}"
    shutil.copytree(old / f"runs-{task}" / optimizer, cwd / out)
    shutil.rmtree(cwd / out / "checkpoints/step-00000006")
    failure = asgo("train", task, "--resume", "--data", f"data-{task}", "--out", out, cwd=cwd)
    return failure + outcome(cwd / out)


def record(cwd: Path, old: Path) -> dict[str, str]:
    """All that is compared, by name. Runs of the folder `old` are resumed and compared."""
    make_data(cwd)
    kept = dict(help_pages(cwd))
    with ThreadPoolExecutor(max_workers=2) as pool:
        jobs = {
            f"config {preset} {optimizer}": pool.submit(configuration, task, preset, optimizer, cwd)
            for task, description in TASKS.items()
            for preset in description.presets
            for optimizer in OPTIMIZERS
        }
        jobs |= {
            f"run {task} {optimizer}": pool.submit(run, task, optimizer, cwd)
            for task in TASKS
            for optimizer in OPTIMIZERS
        }
        kept |= {name: job.result() for name, job in jobs.items()}
        again = {
            f"run {task} {optimizer}": pool.submit(resumed, task, optimizer, old, cwd)
            for task in TASKS
            for optimizer in OPTIMIZERS
        }
        for name, job in again.items():
            kept[f"resumed {name}"] = job.result()
    for task in TASKS:
        kept[f"compare {task}"] = asgo("compare", f"runs-{task}", "--json", "--out", cwd / f"report-{task}", cwd=old)
    for path in sorted(cwd.glob("data-*/*")):
        if path.is_file():
            kept[f"data {path.relative_to(cwd)}"] = sha256_of(path)
    return kept


def help_pages(cwd: Path) -> list[tuple[str, str]]:
    names = [name for name, _ in tree()]
    with ThreadPoolExecutor(max_workers=2) as pool:
        pages = pool.map(lambda name: asgo(*name.split()[1:], "--help", cwd=cwd), names)
    return [(f"help {name}", page) for name, page in zip(names, pages, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--before", type=Path)
    options = parser.parse_args()
    options.folder.mkdir()
    old = (options.before or options.folder).absolute()
    found = record(options.folder.absolute(), old)
    (options.folder / "record.json").write_text(json.dumps(found, indent=1))
    if options.before is None:
        print(f"{len(found)} entries in {options.folder / 'record.json'}")  # noqa: T201
        return
    expected = json.loads((old / "record.json").read_text())
    changed = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    for name in changed:
        before, after = (entries.get(name, "").splitlines() for entries in (expected, found))
        print("\n".join([f"== {name}", *list(difflib.unified_diff(before, after, lineterm="", n=0))[2:]]))  # noqa: T201
    print(f"{len(found)} entries, {len(changed)} differ")  # noqa: T201
    sys.exit(bool(changed))


if __name__ == "__main__":
    main()
