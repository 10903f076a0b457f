"""What a search's file says of its contenders, and a line for everything that is wrong in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.errors import UsageError
from pipelines.resolve import assignment_layer
from pipelines.sweeps.contenders import SearchPlan, plan_search
from pipelines.sweeps.definition import read_sweep

HEAD = """
task = "gpt"
preset = "tiny"
seeds = [1, 2]
[[runs]]
name = "a"
optimizer.name = "asgo"
optimizer.lr = 0.02
[[runs]]
name = "b"
optimizer.name = "adamw"
[search]
"""
ROW = '[search.space]\n"optimizer.lr" = { factor = 10.0, points = 3 }\n'


def plan_of(path: Path, text: str, *assignments: str, seeds: tuple[int, ...] = ()) -> SearchPlan:
    path.write_text(text, encoding="utf-8")
    return plan_search(read_sweep(str(path)), assignment_layer(assignments), seeds)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "my.toml"


def test_every_contender_has_the_same_grid_around_its_own_value(path: Path) -> None:
    plan = plan_of(path, HEAD + "trials = 4\n" + ROW, "optimizers.adamw.lr=0.5")
    a, b = plan.contenders
    assert a.first_points() == [{"optimizer.lr": lr} for lr in (0.02, 0.002, 0.2)]
    assert b.first_points() == [{"optimizer.lr": lr} for lr in (0.5, 0.05, 5.0)]
    trial, final = b.trial(3, {"optimizer.lr": 0.05}), b.final({"optimizer.lr": 5.0}, 2)
    assert (trial.name, trial.config.seed, trial.config.optimizer.lr) == ("b-t3", 0, 0.05)
    assert (final.name, final.config.seed, final.config.optimizer.lr) == ("b-s2", 2, 5.0)


def test_the_shipped_search_is_of_eight_optimizers(path: Path) -> None:
    plan = plan_search(read_sweep("asgo-nanogpt-search"), assignment_layer([]))
    names = ["asgo", "dasgo", "muon", "shampoo", "adamw", "adam", "asro", "accasro"]
    assert [contender.config.optimizer.name for contender in plan.contenders] == names
    assert (plan.search.trials, plan.search.steps, plan.search.seed in plan.seeds) == (12, 1200, False)
    points = plan.contenders[0].first_points()
    rates = sorted({point["optimizer.lr"] for point in points})
    assert rates == pytest.approx([10**-2.5, 1e-2, 10**-1.5], rel=1e-11)
    for contender in plan.contenders:
        decays = {point["optimizer.weight_decay"] for point in contender.first_points()}
        assert sorted(decays) == [0.01, 0.1, 1.0], contender.name


def test_the_shipped_twin_of_track_3_gives_six_optimizers_the_same_budget_for_rates_and_weight_decay() -> None:
    plan = plan_search(read_sweep("track3-small"), assignment_layer([]))
    assert len(plan.contenders) == 6
    assert (plan.search.trials, plan.search.steps, plan.search.sampler) == (16, 500, "qmc")
    extremes = {key for contender in plan.contenders for extreme in contender.extremes() for key in extreme}
    parts = {f"optimizer.parts.{part}.lr" for part in ("embedding", "head")}
    assert extremes == {"optimizer.lr", "optimizer.weight_decay", *parts}


def test_a_row_around_a_center_needs_no_value_of_the_contenders_own(path: Path) -> None:
    decay = '"optimizer.weight_decay" = { factor = 10.0, points = 3'
    text = HEAD.replace('"asgo"', '"adam"') + "trials = 9\n" + ROW + decay
    with pytest.raises(UsageError, match=r"run a: .*own value is 0\.0, but .* add center = VALUE to the row$"):
        plan_of(path, text + " }\n")
    plan = plan_of(path, text + ", center = 0.5 }\n")
    for contender in plan.contenders:
        decays = {point["optimizer.weight_decay"] for point in contender.first_points()}
        assert sorted(decays) == [0.05, 0.5, 5.0]


@pytest.mark.parametrize(
    ("search", "message"),
    [
        (ROW, "search.trials is missing"),
        ("trials = 2\n" + ROW, "search: trials=2 is less than the grid's points=3"),
        ("trials = 0\n" + ROW, "search.trials = 0: should be greater than or equal to 1"),
        ("trials = 4\nsamplr = 'tpe'\n" + ROW, "search.samplr: unknown key"),
        ("trials = 4\npruner = 'med'\n" + ROW, "search.pruner = 'med': should be 'none', 'median', 'hyperband' or"),
        ("trials = 4\n", "search.space = {}: Dictionary should have at least 1 item"),
        ("trials = 4\nspace.optimizer.lr = 3\n", "search.space.optimizer: write { factor, points }, { low, high } or"),
        ("trials = 4\nspace.optimizer.lr = []\n", "optimizer.lr: []: should be a list of numbers or texts"),
        ("trials = 4\nspace.optimizer.lr = {factor = 3.0, points = 4}\n", "optimizer.lr: points=4: must be odd"),
        ("trials = 4\nspace.optimizer.lr = {factor = 1.0, points = 3}\n", "lr.factor = 1.0: should be greater"),
        ("trials = 999\nspace.optimizer.lr = {factor = 100.0, points = 3}\n", "optimizer.lr: so many trials with"),
        ("trials = 4\nspace.optimizer.lr = {factor = 3.0}\n", "search.space.optimizer.lr.points is missing"),
        ("trials = 4\nspace.optimizer.lr = {low = 2, high = 1}\n", "optimizer.lr: low=2 is not below high=1"),
        ("trials = 4\nspace.optimizer.lr = [1.0, 2.0]\n", 'search: sampler = "grid" needs factor and points for each'),
        ("trials = 8\n" + ROW + '"optimizer.eps" = {factor = 3.0, points = 3}', "=8 is less than the grid's points=9"),
        ("trials = 4\nsteps = 0\n" + ROW, "search.steps = 0: should be greater than 0"),
        (
            "trials = 4\nsteps = 9\nsampler = 'qmc'\nspace.training.steps = [20, 40]\n",
            "steps=9 is the length of all trials; remove it, or training.steps in the space",
        ),
        ("trials = 4\nspace.optimizer.lr = {factor = 3.0, points = 3, center = 0.0}\n", "lr.center = 0.0: should be"),
        ("trials = 4\nspace.seed = {low = 2, high = 9}\n", "search.space.seed: all trials have the seed of [search]"),
        ("trials = 4\nspace.optimizer.lrr = {factor = 3.0, points = 3}\n", "optimizer.lrr: unknown setting; did you"),
        ("trials = 4\nspace.training.steps = {factor = 3.0, points = 3}\n", "its own value is 160, but a geometric"),
        ("trials = 4\nspace.optimizer.parts.head.lr = {factor = 3.0, points = 3}\n", "its own value is not set, but a"),
        (
            "trials = 4\nsampler = 'tpe'\nspace.optimizer.weight_decay = {low = -1.0, high = 1.0}\n",
            "optimizer.weight_decay = -1.0: should be greater than or equal to 0",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_in_the_table_is_one_line(path: Path, search: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        plan_of(path, HEAD + search)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_final_runs_have_seeds_and_not_the_searchs_own(path: Path) -> None:
    text = HEAD + "trials = 4\nseed = 2\n" + ROW
    with pytest.raises(UsageError, match=r"seed 2 is search\.seed, .* remove it from"):
        plan_of(path, text)
    assert plan_of(path, text, seeds=(1, 3)).finals == ["a-s1", "b-s1", "a-s3", "b-s3"]
    with pytest.raises(UsageError, match="the final runs of a search need seeds"):
        plan_of(path, text.replace("seeds = [1, 2]", ""))


def test_keywords_of_parts_and_of_imported_optimizers_can_be_searched(path: Path) -> None:
    space = "[search]\ntrials = 4\nsampler = 'random'\nspace.optimizer.weight_decay = [0.0, 0.1]\n"
    space += "space.optimizer.parts.embedding.lr = {low = 0.01, high = 0.1}\n"
    runs = (
        '[[runs]]\nname = "nadam"\noptimizer.name = "torch.NAdam"\n[optimizers."torch.NAdam"]\nmomentum_decay = 0.01\n'
    )
    plan = plan_of(path, 'task = "gpt"\npreset = "tiny"\nseeds = [1, 2]\n' + runs + space)
    (contender,) = plan.contenders
    trial = contender.trial(0, {"optimizer.weight_decay": 0.1, "optimizer.parts.embedding.lr": 0.05})
    expected = {"lr": 2e-3, "momentum_decay": 0.01, "weight_decay": 0.1, "parts": {"embedding": {"lr": 0.05}}}
    assert {key: trial.config.optimizer_keywords()[key] for key in expected} == expected
