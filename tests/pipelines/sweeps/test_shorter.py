"""Trials that are shorter than final runs: their schedules are in proportion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomli_w

from pipelines.resolve import assignment_layer
from pipelines.sweeps.contenders import Contender, plan_search
from pipelines.sweeps.definition import read_sweep
from pipelines.sweeps.search import open_search
from pipelines.training.schedule import factor_at
from tests.conftest import SMALL

SCHEDULE = {
    "kind": "wsd",
    "warmup_steps": 100,
    "momentum": {"kind": "linear", "warmup_steps": 1, "final_fraction": 0.5},
    "parts": {"head": {"warmup_steps": 40}},
}


def contender(path: Path, settings: dict[str, Any], **search: Any) -> Contender:
    table = {"trials": 3, "space": {"optimizer.lr": {"factor": 10.0, "points": 3}}, **search}
    runs = [{"name": "a", "optimizer.name": "muon"}]
    document = {"task": "gpt", "preset": "tiny", "seeds": [1], **SMALL, **settings, "runs": runs, "search": table}
    (path / "my.toml").write_text(tomli_w.dumps(document))
    return plan_search(read_sweep(str(path / "my.toml")), assignment_layer([])).contenders[0]


def test_a_shorter_trial_has_the_schedule_of_the_final_run_in_proportion(tmp_path: Path) -> None:
    long = {"training.steps": 1000, "evaluation.every": 90, "schedule.warmup_fraction": 0.0, "schedule": SCHEDULE}
    found = contender(tmp_path, long, steps=250)
    trial, final = found.trial(0, {"optimizer.lr": 0.5}).config, found.final({"optimizer.lr": 0.5}, 1).config
    assert (trial.training.steps, final.training.steps) == (250, 1000)
    assert (trial.evaluation.every, final.evaluation.every) == (22, 90)
    assert trial.schedule.momentum is not None
    assert (trial.schedule.momentum.warmup_steps, trial.schedule.of_part("head").warmup_steps) == (1, 10)
    assert (trial.optimizer.lr, trial.checkpoint.every) == (0.5, final.checkpoint.every)
    for step in range(250):
        assert factor_at(trial.schedule, step, 250) == pytest.approx(factor_at(final.schedule, 4 * step, 1000))


def test_a_searched_warmup_is_that_of_the_final_run(tmp_path: Path) -> None:
    space = {"schedule.warmup_steps": [8, 80]}
    none = {"schedule.warmup_fraction": 0.0}
    found = contender(tmp_path, {"training.steps": 400, **none}, steps=100, sampler="random", space=space)
    assert found.trial(0, {"schedule.warmup_steps": 80}).config.schedule.warmup_steps == 20
    assert found.final({"schedule.warmup_steps": 80}, 1).config.schedule.warmup_steps == 80


def test_trials_are_never_longer_than_final_runs(tmp_path: Path) -> None:
    found = contender(tmp_path, {}, steps=1000)
    assert found.trial(0, {}).config == found.config


def test_a_pruner_knows_the_length_of_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("pipelines.sweeps.search.make_pruner", lambda *arguments: asked.append(arguments))
    contender(tmp_path, {"training.steps": 80, "evaluation.every": 8}, steps=20, pruner="hyperband")
    open_search(plan_search(read_sweep(str(tmp_path / "my.toml")), assignment_layer([])), tmp_path / "out")
    assert asked == [("hyperband", 2, 20)]
