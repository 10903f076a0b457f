"""optuna's samplers and pruners, behind the claims of a search."""

from __future__ import annotations

import math
import os
import pickle
from pathlib import Path

import pytest

from pipelines.sweeps.study import Claims, Worker, between, make_pruner, make_sampler, one_of, open_storage

WORKER = Worker("a", "here")
SPACE = {"x": between(1e-4, 1.0, log=True), "y": between(0.0, 1.0, log=False)}


@pytest.mark.parametrize("sampler", ["tpe", "random", "gp", "cmaes"])
def test_a_sampler_chooses_within_the_space_and_the_same_again_when_asked_again(sampler: str, tmp_path: Path) -> None:
    claims = Claims(open_storage(None, tmp_path / "study.log"), "study", budget=6)
    seen = []
    while (trial := claims.add(WORKER, None, {}, {})) is not None:
        choice = claims.sample(trial.number, SPACE, make_sampler(sampler, 1, trial.number))
        assert 1e-4 <= choice["x"] <= 1.0
        assert 0.0 <= choice["y"] <= 1.0
        again = claims.sample(trial.number, SPACE, make_sampler(sampler, 1, trial.number))
        assert again == choice, "a run that is taken up again has the settings that it began with"
        seen.append((choice["x"], choice["y"]))
        claims.finish(trial.number, choice["y"])
    assert len(set(seen)) == len(seen) == 6


@pytest.mark.parametrize("pruner", ["median", "hyperband", "successive-halving"])
def test_a_pruner_gives_up_a_trial_that_is_worse_than_all_others(pruner: str, tmp_path: Path) -> None:
    claims = Claims(open_storage(None, tmp_path / "study.log"), "study", pruner=make_pruner(pruner, 10, 80))
    given_up = []
    for number in range(12):
        trial = claims.add(WORKER, None, {}, {})
        assert trial is not None
        gives_up = False
        for step in range(10, 90, 10):
            gives_up |= claims.report(trial.number, step, 1.0 + number)
        claims.prune(trial.number) if gives_up else claims.finish(trial.number, 1.0 + number)
        given_up.append(gives_up)
    assert not given_up[0], "there is nothing to compare the first with"
    assert given_up[-1]


def test_cmaes_keeps_nothing_in_the_study_and_loads_nothing_from_it(tmp_path: Path) -> None:
    """A stranger's journal may hold a pickle where optuna's own sampler would look for its state."""

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    storage = open_storage(None, tmp_path / "study.log")
    claims = Claims(storage, "study")
    for number in range(8):
        trial = claims.add(WORKER, None, {}, {})
        assert trial is not None
        claims.sample(trial.number, SPACE, make_sampler("cmaes", 1, number))
        storage.set_trial_system_attr(trial._trial_id, "cma:optimizer:0", pickle.dumps(Evil()).hex())
        claims.finish(trial.number, 1.0)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("ends", [(1e-4, 1.0), (1, 64)], ids=["float", "int"])
def test_cmaes_comes_nearer_to_the_best_generation_by_generation(ends: tuple[float, float], tmp_path: Path) -> None:
    space = {"x": between(*ends, log=True), "y": between(0.0, 1.0, log=False), "z": one_of(["a", "b"])}
    claims = Claims(open_storage(None, tmp_path / "study.log"), "study")
    distances = []
    for number in range(60):
        trial = claims.add(WORKER, None, {}, {})
        assert trial is not None
        choice = claims.sample(trial.number, space, make_sampler("cmaes", 1, number))
        distances.append(math.log(choice["x"] / ends[0] / 8) ** 2 + (choice["y"] - 0.9) ** 2)
        claims.finish(trial.number, distances[-1])
    assert sum(distances[-12:]) < sum(distances[:12]) / 4
