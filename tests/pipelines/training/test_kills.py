"""Real processes, killed for real at random moments, lose nothing but the steps since the last checkpoint."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from pipelines.config import GPTRunConfig, RunConfig
from pipelines.training.checkpoint import newest_checkpoint
from pipelines.training.train import train
from tests import forks
from tests.conftest import SilentReporter
from tests.long import LONG, long
from tests.pipelines.training.test_resume import assert_same_run

KILLS = 20 if LONG else 4
STEPS = 20
Make = Callable[..., RunConfig]


def train_in_a_process(config: str, out: Path) -> None:
    """What a killed process runs."""
    train(GPTRunConfig.model_validate_json(config), out, SilentReporter(), resume=True)


def start(config: RunConfig, out: Path) -> BaseProcess:
    return forks.start(train_in_a_process, config.model_dump_json(), out)


def finish(config: RunConfig, out: Path) -> float:
    began = time.perf_counter()
    process = start(config, out)
    process.join()
    assert process.exitcode == 0
    return time.perf_counter() - began


def wait_for_records(process: BaseProcess, run: Path, count: int) -> None:
    """By the run's own progress and not by the clock, by which other work on the machine might have it done before."""
    metrics = run / "metrics.jsonl"
    while process.is_alive() and not (metrics.is_file() and metrics.read_text().count("\n") >= count):
        time.sleep(0.001)


def files_in(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for path in run.rglob("*"))


def test_kills_at_random_moments_lose_nothing(small_config: Make, tmp_path: Path) -> None:
    """A checkpoint a step, so that many of the kills fall into the writing of one."""
    config = small_config(training__steps=STEPS, checkpoint__every=1, evaluation__every=5, model__dropout=0.1)
    finish(config, tmp_path / "warm-up")
    duration = finish(config, tmp_path / "whole")
    moments = random.Random()
    torn = 0
    for number in range(KILLS):
        run = tmp_path / f"killed-{number}"
        process = start(config, run)
        wait_for_records(process, run, moments.randrange(STEPS))
        time.sleep(delay := moments.uniform(0, duration / STEPS))
        process.kill()
        process.join()
        torn += any(path.name.startswith(".") for path in run.rglob("*"))
        reached = newest_checkpoint(run / "checkpoints")[0]
        finish(config, run)
        assert_same_run(tmp_path / "whole", run, STEPS)
        assert files_in(run) == files_in(tmp_path / "whole"), (delay, reached)
    assert torn > 0, "none of the kills fell into the writing of a file"


@long
def test_a_run_killed_again_and_again_arrives(small_config: Make, tmp_path: Path) -> None:
    config = small_config(training__steps=STEPS, checkpoint__every=2)
    duration = finish(config, tmp_path / "whole")
    process = start(config, tmp_path / "run")
    for _ in range(100):
        process.join(duration / 4)
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        process = start(config, tmp_path / "run")
        duration *= 1.1  # a slow machine gets there too
    process.join()
    assert process.exitcode == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run", STEPS)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_saves_the_step_it_came_in(number: signal.Signals, small_config: Make, tmp_path: Path) -> None:
    """No checkpoint is due for a long time: the one that is there was saved on the signal."""
    config = small_config(training__steps=100_000, checkpoint__every=100_000, evaluation__every=100_000)
    process = start(config, tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.is_file() or metrics.read_text().count("\n") < 5:
        assert process.is_alive()
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join()
    checkpoint, _ = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None
    last = json.loads(metrics.read_text().splitlines()[-1])
    assert checkpoint.step == last["step"] >= 4
