"""A search of several settings that gets more trials continues. Its runs are written, not trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from pipelines.analysis.comparison.find_runs import find_runs
from pipelines.analysis.comparison.until_certain import Look, Record
from pipelines.errors import UsageError
from pipelines.resolve import assignment_layer
from pipelines.sweeps.contenders import SearchPlan, plan_search
from pipelines.sweeps.definition import read_sweep
from pipelines.sweeps.queue import Ending
from pipelines.sweeps.search import SearchRuns, open_search, record_search
from pipelines.sweeps.status import RunStatus
from pipelines.training.metrics import Row
from pipelines.training.run_folder import RunFolder

Make = Callable[..., SearchPlan]
RATES = {"optimizer.lr": {"factor": 10.0, "points": 3}}
DECAYS = {"optimizer.weight_decay": {"factor": 10.0, "points": 3, "center": 0.1}}
SETTINGS = {"training.steps": 4, "evaluation.every": 2, "data.folder": "none"}


@pytest.fixture
def plan(tmp_path: Path) -> Make:
    """Make the plan of a search; the best rate is 0.01 for `b` and 1 for `a`, far beyond its first trials."""

    def make(trials: int = 3, **search: Any) -> SearchPlan:
        table = {"trials": trials, "space": RATES, **search}
        runs = [
            {"name": "a", "optimizer": {"name": "adam", "lr": 0.01}},
            {"name": "b", "optimizer": {"name": "adamw", "lr": 0.01}},
        ]
        document = {"task": "gpt", "preset": "tiny", "seeds": [1, 2], **SETTINGS, "runs": runs, "search": table}
        (tmp_path / "my.toml").write_text(tomli_w.dumps(document))
        return plan_search(read_sweep(str(tmp_path / "my.toml")), assignment_layer([]))

    return make


def loss_of(run: RunStatus) -> float:
    config = run.run.config
    rate = math.log10(config.optimizer.lr) + (0.0 if run.run.variant == "a" else 2.0)
    return 1 + rate**2 + abs(math.log10(getattr(config.optimizer, "weight_decay", 0.0) or 1.0))


def end(runs: SearchRuns, run: RunStatus) -> Ending:
    """Write a claimed run, and tell what came of it, as the queue does."""
    folder, steps = RunFolder(run.folder), run.run.config.training.steps
    folder.lock()
    folder.begin(run.run.config, {"fingerprint": "x"}, "cpu")
    counts: dict[str, Any] = {"tokens": 0, "samples": 0, "epoch": 0.0, "elapsed_s": 0.0}
    folder.continue_from([Row(**counts, step=steps, split="val", loss=loss_of(run))])
    folder.mark_saved()
    folder.close()
    return runs.ended(run, Ending("done", "done"))


def work(plan: SearchPlan, out: Path, most: int = 99) -> list[str]:
    """Run the search, or the first runs of it, as the command does; returns their names."""
    runs, names = open_search(plan, out), []
    runs.extend()
    record_search(plan, out)
    while len(names) < most and (run := runs.next()) is not None:
        names.append(run.run.name)
        end(runs, run)
    return names


def rate(run: Path) -> float:
    return RunFolder(run).config().optimizer.lr


@pytest.mark.parametrize("storage", ["journal", "sqlite"])
def test_more_trials_continue_the_search_and_renew_only_final_runs_with_a_new_best(
    plan: Make, tmp_path: Path, storage: str
) -> None:
    search = {} if storage == "journal" else {"storage": f"sqlite:///{tmp_path}/x.db"}
    out = tmp_path / "out"
    assert work(plan(3, **search), out)[-4:] == ["a-s1", "b-s1", "a-s2", "b-s2"]
    (before,) = [open_search(plan(3, **search), out).final_values()]
    names = work(plan(5, **search), out)
    assert names == ["a-t3", "b-t3", "a-t4", "b-t4", "a-s1", "a-s2"], "b's best is the same"
    assert (rate(out / "a-s1"), rate(out / "a-s2"), rate(out / "b-s1")) == (1.0, 1.0, 0.01)
    former = out / "trials/superseded"
    assert {path.name: rate(path) for path in former.iterdir()} == {"a-s1-t2": 0.1, "a-s2-t2": 0.1}
    assert not any("superseded" in name for name in find_runs([out]))
    runs = open_search(plan(5, **search), out)
    after = runs.final_values()
    assert [result.settings for result in runs.results()] == [{"optimizer.lr": 1.0}, {"optimizer.lr": 0.01}]
    assert (after["b-s1"], after["b-s2"]) == (before["b-s1"], before["b-s2"])
    assert after["a-s1"] == 1.0 < before["a-s1"]  # type: ignore[operator]
    assert work(plan(5, **search), out) == []
    assert work(plan(6, **search), out) == ["a-t5", "b-t5"], "a third time; the best stays"


def test_a_search_that_gets_more_trials_and_is_killed_anywhere_ends_the_same(plan: Make, tmp_path: Path) -> None:
    work(plan(3), tmp_path / "whole")
    work(plan(5), tmp_path / "whole")
    killed = tmp_path / "killed"
    work(plan(3), killed, most=7)  # after the first final run
    while not any(name.endswith("s2") for name in work(plan(5), killed, most=1)):
        lost = open_search(plan(5), killed).next()  # claimed, and moved out of the way, by a worker that is killed
        assert lost is not None
    assert set(work(plan(5), killed)) <= {"b-s1", "b-s2", "a-s2"}
    for name in ("a-t3", "b-t4"):
        assert rate(killed / "trials" / name) == rate(tmp_path / "whole/trials" / name)
    assert open_search(plan(5), killed).final_values() == open_search(plan(5), tmp_path / "whole").final_values()
    assert [path.name for path in (killed / "trials/superseded").iterdir()] == ["a-s1-t2"]


def test_former_final_runs_stay_until_all_trials_have_ended(plan: Make, tmp_path: Path) -> None:
    work(plan(3), tmp_path)
    assert work(plan(5), tmp_path, most=2) == ["a-t3", "b-t3"]
    assert rate(tmp_path / "a-s1") == 0.1
    assert not (tmp_path / "trials/superseded").exists()


def test_no_more_trials_follow_a_sweep_until_certain(plan: Make, tmp_path: Path) -> None:
    """They could be a reaction to its verdicts, and a new best would replace results that are in its record."""
    work(plan(3), tmp_path)
    record = Record(contenders=("a", "b"), against=None, metric="loss", confidence=0.95, first_look=2, seeds=(1, 2))
    record.write(tmp_path)
    open_search(plan(5), tmp_path)  # no look yet
    record.model_copy(update={"looks": (Look(seeds=2, undecided=()),)}).write(tmp_path)
    with pytest.raises(UsageError, match="final runs of 3 trials were compared until certain here"):
        open_search(plan(5), tmp_path)
    assert work(plan(3), tmp_path) == []


def test_a_final_run_that_another_worker_left_does_not_matter_when_it_is_superseded(plan: Make, tmp_path: Path) -> None:
    storage = {"storage": f"{tmp_path}/x.log"}
    other = open_search(plan(3, **storage), tmp_path / "other")
    while (run := other.next()) is not None and run.run.name != "a-s1":
        end(other, run)
    assert run is not None
    other.ended(run, Ending("stopped", "stopped"))
    assert [left.name for left in open_search(plan(3, **storage), tmp_path / "own").elsewhere()] == ["a-s1"]
    assert work(plan(5, **storage), tmp_path / "own")[-4:] == ["a-s1", "b-s1", "a-s2", "b-s2"]
    assert open_search(plan(5, **storage), tmp_path / "own").elsewhere() == []
    assert work(plan(5, **storage), tmp_path / "other") == []


def test_settings_that_were_tried_twice_are_superseded_once(plan: Make, tmp_path: Path) -> None:
    search = {"sampler": "random", "space": {"optimizer.lr": [0.0001, 0.001, 0.01, 1.0]}}
    work(plan(4, **search), tmp_path)
    held = open_search(plan(4, **search), tmp_path)._contenders[0].claims.held()
    assert [trial.params["optimizer.lr"] for trial in held].count(rate(tmp_path / "a-s1")) > 1
    work(plan(5, **search), tmp_path)
    assert (rate(tmp_path / "a-s1"), len(list((tmp_path / "trials/superseded").glob("a-s1-t*")))) == (1.0, 1)


def test_a_folder_that_is_not_of_the_search_is_not_moved(plan: Make, tmp_path: Path) -> None:
    work(plan(3), tmp_path)
    config = RunFolder(tmp_path / "a-s1").config_path
    config.write_text(config.read_text().replace('"d_ff": 512', '"d_ff": 256'))
    runs = open_search(plan(5), tmp_path)
    runs.extend()
    while (run := runs.next()) is not None and run.run.name != "a-s1":
        end(runs, run)
    assert RunFolder(tmp_path / "a-s1").config().model.d_ff == 256  # type: ignore[attr-defined]
    assert rate(tmp_path / "trials/superseded/a-s2-t2") == 0.1


def test_fewer_trials_and_other_changes_are_refused(plan: Make, tmp_path: Path) -> None:
    work(plan(3), tmp_path)
    work(plan(5), tmp_path, most=1)
    with pytest.raises(UsageError) as error:
        open_search(plan(4), tmp_path)
    assert str(error.value) == (
        "search my already has trials = 5, not 4: trials that were begun count; write trials = 5 or more"
    )
    with pytest.raises(UsageError, match=r"space\.optimizer\.lr\.factor is 10\.0 there, 5\.0 now; choose another"):
        open_search(plan(5, space={"optimizer.lr": {"factor": 5.0, "points": 3}}), tmp_path)
    with pytest.raises(UsageError, match="steps is None there, 2 now"):
        open_search(plan(5, steps=2), tmp_path)


def test_a_search_that_an_earlier_version_began_continues(plan: Make, tmp_path: Path) -> None:
    work(plan(4), tmp_path, most=3)
    claims = open_search(plan(4), tmp_path)._contenders[0].claims
    del claims.definition["search"]["steps"]
    old = {**claims.definition["search"], "space": {"optimizer.lr": {"factor": 10.0, "points": 3}}}
    del old["steps"]
    claims.define({**claims.definition, "search": old})
    assert [trial.user_attrs["choice"] for trial in claims.held()] == [0, -1], "numbers, as that version wrote them"
    assert work(plan(4), tmp_path) == ["b-t1", "a-t2", "b-t2", "a-t3", "b-t3", "a-s1", "b-s1", "a-s2", "b-s2"]


def test_a_grid_of_two_settings_has_its_trials_and_names_the_settings_at_an_edge(plan: Make, tmp_path: Path) -> None:
    work(plan(10, space={**RATES, **DECAYS}), tmp_path)
    search = plan(11, space={**DECAYS, **RATES})  # their order in the file does not matter
    assert search.contenders[0].first_points()[0] == {"optimizer.lr": 0.01, "optimizer.weight_decay": 0.1}
    work(search, tmp_path)
    tried = {
        name: [(trial.user_attrs["choice"], trial.params) for trial in trials.claims.held()]
        for name, trials in zip("ab", open_search(search, tmp_path)._contenders, strict=True)
    }
    assert [position for position, _ in tried["a"]][:3] == [[0, 0], [-1, 0], [0, -1]]
    assert [position for position, _ in tried["a"]][9:] == [[2, 1], [3, 1]], "widened where the best is"
    assert [position for position, _ in tried["b"]][9:] == [[0, 2], [0.5, 1]]
    assert tried["a"][9][1] == {"optimizer.lr": 1.0, "optimizer.weight_decay": 1.0}
    first, second = open_search(search, tmp_path).results()
    assert (first.settings, first.on_edge) == (tried["a"][9][1], ("optimizer.weight_decay",))
    assert second.on_edge == ()
    assert RunFolder(tmp_path / "a-s1").config().optimizer.weight_decay == 1.0  # type: ignore[attr-defined]


@pytest.mark.parametrize("sampler", ["random", "qmc"])
def test_drawn_points_are_the_same_for_all_contenders_and_when_more_follow(
    plan: Make, tmp_path: Path, sampler: str
) -> None:
    def points(out: Path, *trials: int) -> list[list[dict[str, Any]]]:
        for count in trials:
            search = plan(count, sampler=sampler, space={**RATES, **DECAYS, "model.d_ff": [64, 128]})
            work(search, out)
        return [[t.params for t in each.claims.held()] for each in open_search(search, out)._contenders]

    a, b = points(tmp_path / "continued", 3, 7)
    assert a == b, "both have the same own values"
    assert points(tmp_path / "whole", 7) == [a, b]
    assert len({point["optimizer.lr"] for point in a}) == 7
    assert all(0.001 <= point["optimizer.lr"] <= 0.1 for point in a), "between the ends of the row"
    assert {point["model.d_ff"] for point in a} == {64, 128}
