"""A search by accuracy takes the highest one. Its runs are written, not trained: losses rise with accuracies here."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import tomli_w

from pipelines.errors import UsageError
from pipelines.resolve import assignment_layer
from pipelines.sweeps.contenders import SearchPlan, plan_search
from pipelines.sweeps.definition import read_sweep
from pipelines.sweeps.queue import Ending
from pipelines.sweeps.search import SearchRuns, open_search
from pipelines.sweeps.status import RunStatus
from pipelines.sweeps.study import Claims, Worker, between, make_pruner, make_sampler, open_storage
from pipelines.tasks.metric import ACCURACY
from pipelines.training.metrics import Row
from pipelines.training.run_folder import Divergence, RunFolder
from tests.asgo_cli.test_sweep import asgo

ROW = {"optimizer.lr": {"factor": 10.0, "points": 3}}
STEPS = 4
WORKER = Worker("a", "here")

Make = Callable[..., SearchPlan]


@pytest.fixture
def plan(tmp_path: Path) -> Make:
    """Make the plan of a search of one contender with rate 0.01; keywords are of the table [search]."""

    def make(task: str = "images", preset: str = "asro-imagenet", **search: Any) -> SearchPlan:
        table = {"trials": 3, "space": ROW, "metric": "accuracy", **search}
        runs = [{"name": "a", "optimizer.name": "adam", "optimizer.lr": 0.01}]
        settings = {"training.steps": STEPS, "evaluation.every": 1}
        document = {"task": task, "preset": preset, "seeds": [1, 2], **settings, "runs": runs, "search": table}
        (tmp_path / "my.toml").write_text(tomli_w.dumps(document))
        return plan_search(read_sweep(str(tmp_path / "my.toml")), assignment_layer([]))

    return make


def end(runs: SearchRuns, run: RunStatus, accuracy: float | None) -> Ending:
    """Write a claimed run that ends at an accuracy, or diverges if None; tell what came of it, as the queue does."""
    folder = RunFolder(run.folder)
    folder.lock()
    folder.begin(run.run.config, {"fingerprint": "x"}, "cpu")
    if accuracy is None:
        folder.record_divergence(Divergence(2, "not finite"))
        folder.close()
        return runs.ended(run, Ending("failed", "diverged"))
    counts: dict[str, Any] = {"tokens": 0, "samples": 0, "epoch": 0.0, "elapsed_s": 0.0}
    folder.continue_from([Row(**counts, step=STEPS, split="val", loss=1 + accuracy, accuracy=accuracy)])
    folder.mark_saved()
    folder.close()
    return runs.ended(run, Ending("done", "done"))


def work(plan: SearchPlan, out: Path, accuracies: dict[float, float | None]) -> SearchRuns:
    """Run the whole search; `accuracies` are by learning rate, 0.5 for others."""
    runs = open_search(plan, out)
    while (run := runs.next()) is not None:
        end(runs, run, accuracies.get(run.run.config.optimizer.lr, 0.5))
    return runs


def test_the_best_trial_has_the_highest_accuracy_and_the_grid_goes_towards_it(plan: Make, tmp_path: Path) -> None:
    rising: dict[float, float | None] = {0.001: 0.6, 0.01: 0.7, 0.1: 0.8, 1.0: 0.9, 10.0: 0.85}
    runs = work(plan(trials=5), tmp_path / "out", rising)
    (result,) = runs.results()
    assert (result.trials, result.settings, result.value, result.on_edge) == (5, {"optimizer.lr": 1.0}, 0.9, ())
    assert runs.final_values() == {"a-s1": 0.9, "a-s2": 0.9}
    assert {RunFolder(tmp_path / f"out/a-s{seed}").config().optimizer.lr for seed in (1, 2)} == {1.0}


def test_a_trial_that_diverges_is_worse_than_any_accuracy(plan: Make, tmp_path: Path) -> None:
    (result,) = work(plan(trials=4), tmp_path, {0.01: 0.2, 0.001: 0.1, 0.1: None}).results()
    assert (result.trials, result.diverged) == (4, 1)
    fourth = RunFolder(tmp_path / "trials/a-t3").config().optimizer.lr
    assert fourth == pytest.approx(0.01 / math.sqrt(10)), "away from the rate that diverged"
    (nothing,) = work(plan(), tmp_path / "none", dict.fromkeys((0.01, 0.001, 0.1))).results()
    assert (nothing.settings, nothing.value) == (None, None)


def test_the_study_says_that_it_maximizes(plan: Make, tmp_path: Path) -> None:
    work(plan(storage=f"sqlite:///{tmp_path}/x.db"), tmp_path / "out", {})
    study = optuna.load_study(study_name="my/a", storage=f"sqlite:///{tmp_path}/x.db")
    assert (study.direction.name, study.best_value) == ("MAXIMIZE", 0.5)


def test_the_pruner_gives_up_low_accuracies(plan: Make, tmp_path: Path) -> None:
    runs = open_search(plan(pruner="successive-halving"), tmp_path)
    given_up = []
    for accuracies in ([0.1, 0.5, 0.8, 0.9], [0.1, 0.2], [0.1, 0.6]):
        run = runs.next()
        assert run is not None
        rows = [{"step": step, "loss": 1.0, "accuracy": accuracy} for step, accuracy in enumerate(accuracies)]
        given_up.append([runs.recorded(run, row) for row in rows][-1])  # type: ignore[arg-type]
        end(runs, run, accuracies[-1])
    assert given_up == [False, True, False]


@pytest.mark.parametrize("sampler", ["cmaes", "tpe"])
def test_samplers_come_nearer_to_the_highest(sampler: str, tmp_path: Path) -> None:
    space = {"x": between(0.0, 1.0, log=False), "y": between(0.0, 1.0, log=False)}
    claims = Claims(open_storage(None, tmp_path / "study.log"), "study", metric=ACCURACY)
    accuracies = []
    for number in range(48 if sampler == "cmaes" else 24):
        trial = claims.add(WORKER, None, {}, {})
        assert trial is not None
        choice = claims.sample(trial.number, space, make_sampler(sampler, 1, trial.number))
        accuracies.append(1 - (choice["x"] - 0.9) ** 2 - (choice["y"] - 0.1) ** 2)
        claims.finish(trial.number, -math.inf if number == 3 else accuracies[-1])
    assert sum(accuracies[-8:]) > sum(accuracies[:8]) + 0.5


@pytest.mark.parametrize("pruner", ["median", "hyperband"])
def test_pruners_keep_the_highest(pruner: str, tmp_path: Path) -> None:
    storage = open_storage(None, tmp_path / "study.log")
    claims = Claims(storage, "study", pruner=make_pruner(pruner, 10, 80), metric=ACCURACY)
    given_up = []
    for number in range(12):
        trial = claims.add(WORKER, None, {}, {})
        assert trial is not None
        given_up.append(any(claims.report(trial.number, step, 0.9 - number / 20) for step in range(10, 90, 10)))
        claims.finish(trial.number, 0.9 - number / 20)
    assert (given_up[0], given_up[-1]) == (False, True)


def test_another_metric_is_refused_in_one_line(plan: Make, tmp_path: Path) -> None:
    open_search(plan(), tmp_path)
    with pytest.raises(UsageError) as error:
        open_search(plan(metric="loss"), tmp_path)
    assert str(error.value) == (
        "search my differs from the one begun here: metric is accuracy there, loss now; choose another --out"
    )


def test_a_study_of_a_version_without_metrics_is_one_of_losses(plan: Make, tmp_path: Path) -> None:
    runs = open_search(plan(metric="loss"), tmp_path)
    (trials,) = runs._contenders
    definition = trials.claims.definition
    del definition["search"]["metric"]
    trials.claims.define(definition)
    open_search(plan(metric="loss"), tmp_path)
    with pytest.raises(UsageError, match="metric is loss there, accuracy now"):
        open_search(plan(), tmp_path)


def test_a_task_without_accuracy_is_refused_before_anything_is_made(plan: Make, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        plan("gpt", "tiny")
    assert str(error.value) == (
        f"{tmp_path}/my.toml: search.metric accuracy: the task gpt records no accuracy; choose loss"
    )
    assert plan("gpt", "tiny", metric="loss").metric.name == "loss"
    with pytest.raises(UsageError, match=r"search\.metric = 'speed': should be 'loss' or 'accuracy'"):
        plan(metric="speed")


def test_the_command_prints_accuracies(
    plan: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work(plan(), tmp_path / "out", {0.1: 0.625})
    for options in ((), ("--json",)):
        assert asgo(monkeypatch, tmp_path / "my.toml", "--out", tmp_path / "out", *options) == 0
    shown = capsys.readouterr().out
    table, numbers = shown[: shown.index("{")], json.loads(shown[shown.index("{") :])
    assert "its accuracy" in table
    assert [cell.strip() for cell in table.splitlines()[3].strip("│").split("│")] == [
        "a", "3 of 3", "lr 0.1", "62.50%", "62.50% 62.50%",
    ]  # fmt: skip
    (row,) = numbers["contenders"]
    assert (row["best_accuracy"], row["final_accuracies"][0]) == (0.625, {"seed": 1, "accuracy": 0.625})
