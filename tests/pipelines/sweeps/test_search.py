"""The trials and final runs of a search, shared by workers: real studies, real runs."""

from __future__ import annotations

import math
import multiprocessing
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from pipelines.errors import AsgoError, UsageError
from pipelines.resolve import assignment_layer
from pipelines.sweeps.contenders import SearchPlan, plan_search
from pipelines.sweeps.definition import read_sweep
from pipelines.sweeps.queue import Ending
from pipelines.sweeps.search import SearchRuns, open_search
from pipelines.sweeps.status import RunStatus
from pipelines.sweeps.study import Claims, Worker, open_storage
from pipelines.training.run_folder import RunFolder
from pipelines.training.train import train
from tests.conftest import SMALL, SilentReporter

ROW = {"optimizer.lr": {"factor": 10.0, "points": 3}}
PLAIN = {"schedule.kind": "constant", "schedule.warmup_fraction": 0.0, "training.max_grad_norm": 1e30}


@pytest.fixture
def plan(token_folder: Path, tmp_path: Path) -> Callable[..., SearchPlan]:
    """Make the plan of a search with small runs; keywords are of the table [search]."""

    def make(*assignments: str, **search: Any) -> SearchPlan:
        runs = [{"name": "a", "optimizer.name": "asgo"}, {"name": "b", "optimizer.name": "adamw"}]
        table = {"trials": 4, "space": ROW, **search}
        settings = {**SMALL, **PLAIN, "data.folder": str(token_folder)}
        document = {"task": "gpt", "preset": "tiny", "seeds": [1, 2], **settings, "runs": runs, "search": table}
        (tmp_path / "my.toml").write_text(tomli_w.dumps(document))
        return plan_search(read_sweep(str(tmp_path / "my.toml")), assignment_layer(assignments))

    return make


def end(runs: SearchRuns, run: RunStatus) -> Ending:
    """Train a claimed run in this process, and tell what came of it, as the queue does."""
    try:
        train(run.run.config, run.folder, SilentReporter(), resume=True)
    except AsgoError as error:
        return runs.ended(run, Ending("failed", str(error)))
    return runs.ended(run, Ending("done", "done"))


def work(plan: SearchPlan, out: Path) -> list[str]:
    """All that a worker finds to do; returns the names of its runs."""
    runs, names = open_search(plan, out), []
    while True:
        runs._searched_s = -math.inf
        run = runs.next()
        if run is not None:
            names.append(run.run.name)
            end(runs, run)
        elif runs.waiting is None:
            return names


def learning_rates(out: Path) -> dict[str, float]:
    """Of all trials in a folder, from what they were trained with."""
    folders = sorted((out / "trials").glob("*-t*"))
    return {folder.name: RunFolder(folder).config().optimizer.lr for folder in folders}


def final_loss(run: Path) -> float:
    return [row["loss"] for row in RunFolder(run).rows() if row["split"] == "val"][-1]


def test_every_contender_has_its_trials_and_then_final_runs_at_its_best(
    plan: Callable[..., SearchPlan], tmp_path: Path
) -> None:
    search, out = plan(), tmp_path / "out"
    names = work(search, out)
    trials = [f"{name}-t{number}" for number in range(4) for name in "ab"]
    assert names == [*trials, "a-s1", "b-s1", "a-s2", "b-s2"]
    for result in open_search(search, out).results():
        name = result.contender.name
        losses = {trial: final_loss(out / "trials" / trial) for trial in trials if trial.startswith(name)}
        best = min(losses, key=losses.__getitem__)
        lr = learning_rates(out)[best]
        assert (result.trials, result.value, result.settings) == (4, losses[best], {"optimizer.lr": lr})
        assert {RunFolder(out / f"{name}-s{seed}").config().optimizer.lr for seed in (1, 2)} == {lr}
        at_edge = lr in (min(learning_rates(out).values()), max(learning_rates(out).values()))
        assert result.on_edge == (("optimizer.lr",) if at_edge else ())
    assert open_search(search, out).final_values() == {
        name: final_loss(out / name) for name in ("a-s1", "b-s1", "a-s2", "b-s2")
    }
    assert work(search, out) == []


def test_a_trial_that_diverges_counts_as_infinite_and_the_search_goes_on(
    plan: Callable[..., SearchPlan], tmp_path: Path
) -> None:
    search = plan(space={"optimizer.lr": {"factor": 100.0, "points": 15}}, trials=15)
    only = SearchPlan(search.name, search.search, search.contenders[1:], (1,))
    work(only, tmp_path)
    (result,) = open_search(only, tmp_path).results()
    diverged = [path.parent.name for path in (tmp_path / "trials").glob("*/diverged.json")]
    assert result.trials == 15
    assert 0 < result.diverged == len(diverged) < 15
    assert result.value is not None
    assert math.isfinite(result.value)


def test_a_failed_trial_keeps_its_place_and_is_tried_again_by_the_next_call_alone(
    plan: Callable[..., SearchPlan], tmp_path: Path
) -> None:
    search, runs = plan(), open_search(plan(), tmp_path)
    first = runs.next()
    assert first is not None
    ending = runs.ended(first, Ending("failed", "no space left on device"))
    assert ending == Ending("failed", "no space left on device")
    names = []
    while (run := runs.next()) is not None:
        names.append(run.run.name)
        end(runs, run)
    assert names == [*(f"b-t{number}" for number in range(4)), "b-s1", "b-s2"], "nothing of a any more"
    assert runs.waiting is None
    assert work(search, tmp_path) == ["a-t0", "a-t1", "a-t2", "a-t3", "a-s1", "a-s2"]
    assert [result.trials for result in open_search(search, tmp_path).results()] == [4, 4]


def test_a_worker_that_is_killed_takes_its_trial_up_again_and_finds_the_same(
    plan: Callable[..., SearchPlan], tmp_path: Path
) -> None:
    search = plan(sampler="tpe", space={**ROW, "optimizer.weight_decay": {"low": 0.0, "high": 0.5}}, trials=3)
    assert work(search, tmp_path / "whole")[:2] == ["a-t0", "b-t0"]
    lost = open_search(search, tmp_path / "killed").next()  # its worker is never heard of again
    assert lost is not None
    assert work(search, tmp_path / "killed")[:2] == ["a-t0", "b-t0"]
    whole, killed = (open_search(search, tmp_path / name).results() for name in ("whole", "killed"))
    assert [(result.settings, result.value) for result in whole] == [
        (result.settings, result.value) for result in killed
    ]
    rates = learning_rates(tmp_path / "whole")
    assert rates == learning_rates(tmp_path / "killed")
    assert len(set(rates.values())) == 6, "each trial draws its own"


def test_another_search_of_the_same_name_is_refused(plan: Callable[..., SearchPlan], tmp_path: Path) -> None:
    open_search(plan(), tmp_path)
    with pytest.raises(UsageError) as error:
        open_search(plan("training.steps=7", trials=5, pruner="median"), tmp_path)
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert (
        lines[0] == "search my differs from the one begun here: pruner is none there, median now; choose another --out"
    )
    assert "a: training.steps is 6" in lines[1]


def test_a_storage_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    for url in ("nonsense", f"sqlite:///{tmp_path}/none/x.db", "postgresql+nodriver://host/x"):
        with pytest.raises(UsageError, match=r"^search\.storage: cannot be opened: .+$") as error:
            open_storage(url, tmp_path / "unused")
        assert "\n" not in str(error.value)


def in_processes(target: Callable[..., None], arguments: list[tuple[Any, ...]]) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=target, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0] * len(processes)


def claim_all(url: str | None, folder: Path, number: int) -> None:
    """Claim what is left of ten choices, the same ones as everybody, until eight are held."""
    claims, worker = Claims(open_storage(url, folder / "study.log"), "x/a", budget=8), Worker(str(number), "here")
    while len(held := claims.held()) < 8:
        free = next(choice for choice in range(10) if all(trial.user_attrs["choice"] != choice for trial in held))
        trial = claims.add(worker, free, {}, {})
        if trial is not None:
            claims.finish(trial.number, float(free))
            with (folder / "finished").open("a") as file:
                file.write(f"{free}\n")


@pytest.mark.parametrize("storage", ["journal", "sqlite"])
def test_claims_at_the_same_moment_never_meet_and_keep_the_budget(storage: str, tmp_path: Path) -> None:
    url = None if storage == "journal" else f"sqlite:///{tmp_path}/x.db"
    in_processes(claim_all, [(url, tmp_path, number) for number in range(4)])
    finished = sorted(map(int, (tmp_path / "finished").read_text().split()))
    assert finished == list(range(8)), "each once, by whomever"
    held = Claims(open_storage(url, tmp_path / "study.log"), "x/a", budget=8).held()
    assert sorted(trial.user_attrs["choice"] for trial in held) == finished


def work_and_leave_word(plan: SearchPlan, out: Path) -> None:
    (out.parent / f"{out.name}.txt").write_text("\n".join(work(plan, out)))


@pytest.mark.parametrize("storage", ["journal", "sqlite"])
def test_two_workers_share_a_search_without_running_anything_twice(
    storage: str, plan: Callable[..., SearchPlan], tmp_path: Path
) -> None:
    outs = [tmp_path / "one", tmp_path / "two"]
    search = plan(storage=f"{tmp_path}/x.log" if storage == "journal" else f"sqlite:///{tmp_path}/x.db")
    in_processes(work_and_leave_word, [(search, out) for out in outs])
    names = [name for out in outs for name in (tmp_path / f"{out.name}.txt").read_text().split()]
    assert len(names) == len(set(names)), "nothing twice"
    numbers = [name for name in names if "-t" in name]
    assert [sum(name.startswith(contender) for name in numbers) for contender in "ab"] == [4, 4]
    assert sorted(set(names) - set(numbers)) == ["a-s1", "a-s2", "b-s1", "b-s2"]
    rates = [(name.split("-")[0], lr) for out in outs for name, lr in learning_rates(out).items()]
    assert len(set(rates)) == 8, "no point of the grid twice"
    assert [result.complete for result in open_search(search, outs[0]).results()] == [True, True]


def test_a_worker_waits_for_trials_of_others_but_not_for_those_they_have_left(
    plan: Callable[..., SearchPlan], tmp_path: Path
) -> None:
    search = plan(storage=f"sqlite:///{tmp_path}/x.db")
    other = open_search(search, tmp_path / "other")
    theirs = other.next()
    assert theirs is not None
    runs = open_search(search, tmp_path / "own")
    while (run := runs.next()) is not None:
        end(runs, run)
    assert runs.waiting is not None
    assert runs.waiting.startswith("waiting for 1 trials of other workers: ")
    assert runs.waiting.endswith(":" + str(tmp_path / "other"))
    other.ended(theirs, Ending("stopped", "stopped"))
    runs._searched_s = -math.inf
    assert runs.next() is None
    assert runs.waiting is None
    ((name, left),) = [(run.name, run.left) for run in runs.elsewhere()]
    assert (name, left) == ("a-t0", "stopped")


def test_a_trial_that_the_pruner_gives_up_counts_with_its_last_loss_and_is_not_taken_up_again(
    plan: Callable[..., SearchPlan], tmp_path: Path
) -> None:
    search = plan("evaluation.every=2", pruner="successive-halving", trials=3)
    only = SearchPlan(search.name, search.search, search.contenders[:1], (1,))
    runs = open_search(only, tmp_path)

    def claim(losses: list[float]) -> tuple[RunStatus, list[bool]]:
        run = runs.next()
        assert run is not None
        rows = [{"split": "val", "step": 2 * number, "loss": loss} for number, loss in enumerate(losses)]
        return run, [runs.recorded(run, row) for row in rows]  # type: ignore[arg-type]

    good, given_up = claim([9.0, 2.0, 1.0, 0.5])
    assert given_up == [False, False, False, False]
    assert end(runs, good).kind == "done"
    poor, given_up = claim([9.0, 3.0])
    assert given_up == [False, True]
    assert runs.ended(poor, Ending("stopped", "stopped")).words.startswith("pruned, lr ")
    (result,) = runs.results()
    assert (result.trials, result.pruned, result.settings) == (2, 1, {"optimizer.lr": good.run.config.optimizer.lr})
    assert work(only, tmp_path) == ["a-t2", "a-s1"]


@pytest.mark.parametrize("storage", ["journal", "sqlite"])
def test_of_claims_that_meet_the_one_with_the_lowest_number_holds(storage: str, tmp_path: Path) -> None:
    url = f"{tmp_path}/x.log" if storage == "journal" else f"sqlite:///{tmp_path}/x.db"
    first, second = (Claims(open_storage(url, tmp_path / "unused"), "x/a", budget=3) for _ in range(2))
    one, two = Worker("1", "here"), Worker("2", "there")
    assert first.held() == second.held() == []
    assert first.add(one, 0.5, {}, {}) is not None
    assert second.add(two, 0.5, {}, {}) is None, "the same choice"
    assert [first.add(one, None, {}, {}) is None, second.add(two, None, {}, {}) is None] == [False, False]
    assert first.add(one, None, {}, {}) is None, "above the budget"
    for claims in (first, second):
        assert [(trial.number, trial.user_attrs["worker"]) for trial in claims.held()] == [(0, "1"), (2, "1"), (3, "2")]


def test_a_trial_that_ends_names_the_part_of_the_model_whose_rate_it_tried(
    plan: Callable[..., SearchPlan], tmp_path: Path
) -> None:
    search = plan(
        sampler="random",
        trials=1,
        space={**ROW, "optimizer.parts.embedding.lr": {"factor": 3.0, "points": 3, "center": 0.5}},
    )
    only = SearchPlan(search.name, search.search, search.contenders[:1], (1,))
    runs = open_search(only, tmp_path)
    run = runs.next()
    assert run is not None
    words = end(runs, run).words
    lr = run.run.config.optimizer.lr
    assert re.fullmatch(rf"done, lr {lr:g}, embedding\.lr [\d.]+: loss [\d.]+", words)
