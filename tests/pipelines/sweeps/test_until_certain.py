"""Seeds until certain: which runs come next, what is recorded, and what is refused. No run is trained here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from pipelines.analysis.comparison.compare import compare_runs
from pipelines.analysis.comparison.until_certain import RECORD, read_record
from pipelines.config import RunConfig
from pipelines.errors import AsgoError, UsageError
from pipelines.sweeps.definition import Sweep, SweepRun
from pipelines.sweeps.queue import Ending
from pipelines.sweeps.search_table import read_search
from pipelines.sweeps.until_certain import Plan, Seeds, SeedWish, Standing, UntilCertain, plan_runs, standing_of
from pipelines.tasks.metric import LOSS
from pipelines.training.train import train
from tests.conftest import SilentReporter
from tests.long import sampled
from tests.pipelines.analysis.comparison.run_folders import config_of, falling_to, record_divergence, write_run

SEEDS = Seeds((1, 2, 3), (1, 2, 3, 4, 5, 6, 7, 8))
OPTIMIZERS = ("asgo", "muon", "adamw", "adam")


def plan_of(names: Sequence[str], against: str | None = None, seeds: Seeds = SEEDS) -> Plan:
    runs = [
        SweepRun(f"{name}-s{seed}", name, config_of(optimizer__name=optimizer, seed=seed))
        for seed in seeds.all
        for name, optimizer in zip(names, OPTIMIZERS, strict=False)
    ]
    return plan_runs(runs, seeds, LOSS, against)


FINALS: Mapping[str, Sequence[float]] = {
    "asgo": [3.00, 3.02, 3.01, 3.00, 3.01, 3.02, 3.01, 3.00],
    "muon": [3.02, 3.03, 3.035, 3.018, 3.032, 3.041, 3.03, 3.02],
    "adamw": [3.90, 3.925, 3.913, 3.90, 3.91, 3.92, 3.91, 3.90],
}
"""adamw is worse after 3 seeds; asgo and muon are undecided for longer."""


def train_all(
    plan: Plan,
    out: Path,
    finals: Mapping[str, Sequence[float | None]] = FINALS,
    stop_after: int = 1000,
    told: list[Standing] | None = None,
) -> list[str]:
    """Do what the queue does, with one slot; return the names of the runs in their order. None diverges."""
    source = UntilCertain(plan, out, (told if told is not None else []).append)
    names: list[str] = []
    while len(names) < stop_after and (run := source.next()) is not None:
        names.append(run.run.name)
        seed = run.run.config.seed
        final = finals[run.run.variant][seed - 1]
        val = falling_to(final) if final is not None else {0: 5.0}
        folder = write_run(run.folder, val, optimizer=run.run.config.optimizer.name, seed=seed)
        if final is None:
            record_divergence(folder, 7, "the loss is inf")
            assert source.ended(run, Ending("failed", "the loss is inf")) == Ending("done", "diverged at step 7")
        else:
            folder.lock()
            folder.mark_saved()  # finished, though its checkpoints are gone
            folder.close()
            source.ended(run, Ending("done", "done"))
    return names


def contents(out: Path) -> str:
    return (out / RECORD).read_text()


def test_only_contenders_of_undecided_pairs_get_more_seeds(tmp_path: Path) -> None:
    told: list[Standing] = []
    names = train_all(plan_of(list(FINALS)), tmp_path, told=told)
    assert names[:9] == [f"{name}-s{seed}" for seed in (1, 2, 3) for name in FINALS]
    assert names[9:11] == ["asgo-s4", "muon-s4"]
    assert not [name for name in names[9:] if name.startswith("adamw")]
    last = told[-1]
    assert len(last.looks) < 6, "decided before the last seed"
    assert len(names) == 9 + 2 * (len(last.looks) - 1)
    assert [look.undecided for look in last.looks] == [(("asgo", "muon"),)] * (len(last.looks) - 1) + [()]
    assert {(each.first, each.second): each.outcome for each in last.verdicts} == {
        ("asgo", "muon"): "better", ("asgo", "adamw"): "better", ("muon", "adamw"): "better",
    }  # fmt: skip
    assert len([each for each in told if not each.looks]) == 1


def test_a_plain_comparison_gives_the_same_verdicts(tmp_path: Path) -> None:
    told: list[Standing] = []
    train_all(plan_of(list(FINALS)), tmp_path, told=told)
    comparison = compare_runs([tmp_path])
    assert {each.test for each in comparison.verdicts} == {"sequential"}
    expected = {(each.first, each.second): each.outcome for each in told[-1].verdicts}
    assert {(each.first, each.second): each.outcome for each in comparison.verdicts} == expected
    assert "paired t-tests after 3 to 8 seeds, where n seeds spend (n/8)^3 of the error rate" in comparison.rule


@pytest.mark.parametrize("kept", sampled([1, 9, 10, 11], 10))
def test_a_sweep_that_ends_at_any_run_goes_on_to_the_same_record(kept: int, tmp_path: Path) -> None:
    plan = plan_of(list(FINALS))
    whole = train_all(plan, tmp_path / "whole")
    begun = train_all(plan, tmp_path / "parts", stop_after=kept)
    assert begun + train_all(plan, tmp_path / "parts") == whole
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert train_all(plan, tmp_path / "parts") == []
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_undecided_pairs_end_at_the_last_seed(tmp_path: Path) -> None:
    equal = {"asgo": [3.0, 3.1, 3.0, 3.1, 3.0, 3.2, 3.0, 3.1], "muon": [3.1, 3.0, 3.1, 3.0, 3.1, 3.0, 3.15, 3.0]}
    told: list[Standing] = []
    assert len(train_all(plan_of(list(equal)), tmp_path, equal, told=told)) == 16
    assert [look.seeds for look in told[-1].looks] == [3, 4, 5, 6, 7, 8]
    assert [each.outcome for each in told[-1].verdicts] == ["cannot tell"]
    assert told[-1].missing == ()


def test_against_one_contender_the_other_pairs_do_not_matter(tmp_path: Path) -> None:
    names = train_all(plan_of(list(FINALS), against="adamw"), tmp_path)
    assert len(names) == 9
    comparison = compare_runs([tmp_path])
    assert comparison.against is not None
    assert comparison.against.optimizer == "adamw"
    assert [(each.first, each.second) for each in comparison.verdicts] == [("asgo", "adamw"), ("muon", "adamw")]
    assert compare_runs([tmp_path], against="muon").against != comparison.against


def test_a_contender_that_diverged_gets_no_more_seeds_and_is_not_trained_again(tmp_path: Path) -> None:
    finals = {**FINALS, "muon": [3.02, None, 3.035]}
    plan = plan_of(list(FINALS))
    told: list[Standing] = []
    assert len(train_all(plan, tmp_path, finals, told=told)) == 9
    assert told[-1].looks[-1].undecided == (("asgo", "muon"),)
    assert json.loads(contents(tmp_path))["results"]["muon"] == {"1": 3.02, "2": None, "3": 3.035}
    assert train_all(plan, tmp_path, finals) == []
    everything = {name: [None] * 3 for name in FINALS}
    assert len(train_all(plan, tmp_path / "all", everything)) == 9
    assert len(train_all(plan_of(list(FINALS), "muon"), tmp_path / "reference", {**FINALS, "muon": [None] * 3})) == 9


def test_a_failed_run_ends_the_sweep_after_the_other_runs_of_its_look(tmp_path: Path) -> None:
    source = UntilCertain(plan_of(list(FINALS)), tmp_path, lambda standing: None)
    started = []
    while (run := source.next()) is not None:
        started.append(run.run.name)
        failure = Ending("failed", "the disk is full")
        assert source.ended(run, failure) == failure
    assert len(started) == 9


def test_a_run_without_its_last_validation_resumes_and_is_an_error_if_that_does_not_help(
    small_config: Callable[..., RunConfig], tmp_path: Path, reporter: SilentReporter
) -> None:
    """As after a kill between the last step and the validation."""
    runs = [
        SweepRun(f"{name}-s{seed}", name, small_config(optimizer__name=name, seed=seed))
        for seed in (1, 2)
        for name in ("asgo", "adamw")
    ]
    for run in runs:
        train(run.config, tmp_path / run.name, reporter)
    path = tmp_path / "asgo-s1" / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    source = UntilCertain(plan_runs(runs, Seeds((1, 2), (1, 2)), LOSS, None), tmp_path, lambda standing: None)
    status = source.next()
    assert status is not None
    assert (status.run.name, status.state) == ("asgo-s1", "done")
    source.ended(status, Ending("done", "done"))
    with pytest.raises(AsgoError, match="asgo-s1: ended without a validation after the last step"):
        source.next()
    train(status.run.config, status.folder, reporter, resume=True)
    assert source.next() is None
    assert source.look().looks[-1].seeds == 2


def test_while_runs_of_a_look_are_in_progress_there_is_no_next_look(tmp_path: Path) -> None:
    source = UntilCertain(plan_of(list(FINALS)), tmp_path, lambda standing: None)
    assert all(source.next() for _ in range(9))
    assert source.next() is None


def test_another_plan_for_the_folder_is_refused(tmp_path: Path) -> None:
    train_all(plan_of(list(FINALS)), tmp_path, stop_after=9)
    before, fewer = contents(tmp_path), Seeds((1, 2, 3), (1, 2, 3, 4))
    others = {
        "seeds: 1, 2, 3, 4, 5, 6, 7, 8 there, 1, 2, 3, 4 now": plan_of(list(FINALS), seeds=fewer),
        "against: all pairs there, adamw now": plan_of(list(FINALS), "adamw"),
        "contenders: asgo, muon, adamw there, asgo, muon now": plan_of(["asgo", "muon"]),
    }  # fmt: skip
    for message, plan in others.items():
        with pytest.raises(UsageError) as error:
            UntilCertain(plan, tmp_path, lambda standing: None)
        assert message in str(error.value)
    assert contents(tmp_path) == before


def test_a_run_that_changed_after_a_look_is_an_error(tmp_path: Path) -> None:
    plan = plan_of(list(FINALS))
    train_all(plan, tmp_path, stop_after=10)
    path = tmp_path / "adamw-s2" / "metrics.jsonl"
    path.write_text(path.read_text().replace("3.925", "3.5"))
    with pytest.raises(AsgoError, match=r"adamw-s2: changed after a look at its result, which was 3\.925"):
        UntilCertain(plan, tmp_path, lambda standing: None).look()


def test_the_standing_depends_on_the_results_alone() -> None:
    plan = plan_of(list(FINALS))
    results = {name: dict(enumerate(values, start=1)) for name, values in FINALS.items()}
    whole = standing_of(plan, results)
    used = {name: whole.looks[-1].seeds if name != "adamw" else 3 for name in results}
    seen = {name: {seed: own[seed] for seed in own if seed <= used[name]} for name, own in results.items()}
    assert standing_of(plan, seen) == whole
    reversed_ = {name: dict(reversed(own.items())) for name, own in seen.items()}
    assert standing_of(plan, reversed_) == whole


def sweep_with(seeds: tuple[int, ...], search_seed: int | None = None) -> Sweep:
    table = {"trials": 3, "space.optimizer.lr": [0.1, 0.2], "sampler": "random", "seed": search_seed}
    search = None if search_seed is None else read_search(table)
    return Sweep("my", "my.toml", "gpt", "tiny", seeds=seeds, search=search)


def test_the_seeds_continue_after_those_given_without_the_seed_of_a_search() -> None:
    assert SeedWish([], None, None).seeds(sweep_with(())) == SEEDS
    assert SeedWish([], 4, None).seeds(sweep_with((5, 2))) == Seeds((5, 2), (5, 2, 6, 7))
    assert SeedWish([10, 11], 3, None).seeds(sweep_with((5, 2))) == Seeds((10, 11), (10, 11, 12))
    assert SeedWish([], 5, None).seeds(sweep_with((), 2)) == Seeds((1, 3, 4), (1, 3, 4, 5, 6))
    for wish in (SeedWish([7], None, None), SeedWish([1, 2, 3], 2, None)):
        with pytest.raises(UsageError, match=r"give two seeds or more, and --max-seeds .* not below their number"):
            wish.seeds(sweep_with(()))


def test_contenders_that_a_comparison_would_merge_are_refused() -> None:
    runs = [
        SweepRun(f"{name}-s1", name, config_of(optimizer__name="asgo", optimizer__lr=lr, seed=1))
        for name, lr in (("slow", 0.01), ("fast", 0.02))
    ]
    with pytest.raises(UsageError, match="slow and fast differ at most in the learning rate"):
        plan_runs(runs, Seeds((1,), (1,)), LOSS, None)
    with pytest.raises(UsageError, match="there is only one"):
        plan_runs(runs[:1], Seeds((1,), (1,)), LOSS, None)
    with pytest.raises(UsageError, match="--against none: no contender has this name; choose one of asgo, muon"):
        plan_of(["asgo", "muon"], "none")


def test_the_record_reads_back(tmp_path: Path) -> None:
    plan = plan_of(list(FINALS))
    train_all(plan, tmp_path)
    record = read_record(tmp_path)
    assert record is not None
    assert record.differences(plan.record) == []
    assert record.results["adamw"] == {1: 3.90, 2: 3.925, 3: 3.913}
