"""Entries, targets, bands and sensitivities are what the run folders say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.analysis.comparison.compare import compare_runs
from pipelines.analysis.comparison.results import Comparison, Entry, Reach, SensitivityPoint, Target
from pipelines.config import RunConfig
from pipelines.errors import UsageError
from pipelines.training.train import train
from tests.conftest import SilentReporter
from tests.pipelines.analysis.comparison.run_folders import falling_to, write_run


def entry(comparison: Comparison, label: str) -> Entry:
    """The entry of that label."""
    return next(entry for entry in comparison.entries if entry.label == label)


def labels(*paths: Path) -> list[str]:
    """The labels of a comparison's entries."""
    return [entry.label for entry in compare_runs(paths).entries]


def test_trained_runs_are_compared(
    small_config: Callable[..., RunConfig], tmp_path: Path, reporter: SilentReporter
) -> None:
    finals: dict[str, list[float]] = {"adamw": [], "asgo": []}
    for optimizer, losses in finals.items():
        for seed in (1, 2):
            config = small_config(optimizer__name=optimizer, seed=seed)
            losses.append(train(config, tmp_path / f"{optimizer}-s{seed}", reporter)[-1]["loss"])
    comparison = compare_runs([tmp_path])
    assert (comparison.task, comparison.unit, comparison.confidence) == ("gpt", "tokens", 0.95)
    assert [each.label for each in comparison.entries] == sorted(finals, key=lambda name: np.mean(finals[name]))
    for name, losses in finals.items():
        found = entry(comparison, name).final
        assert found is not None
        assert (found.mean, found.count) == (pytest.approx(np.mean(losses)), 2)
    assert comparison.target == Target(pytest.approx(np.mean(finals["adamw"])), "adamw's final loss")
    assert comparison.contenders == comparison.entries
    assert comparison.sensitivities == ()
    assert comparison.cautions == ()


def test_runs_that_differ_in_seed_and_carriage_alone_are_one_entry(tmp_path: Path) -> None:
    write_run(tmp_path / "z", falling_to(3.0), seed=1)
    write_run(
        tmp_path / "a", falling_to(3.1), seed=2, runtime__compile=True, checkpoint__keep=9, data__folder="else/where"
    )
    (found,) = compare_runs([tmp_path]).entries
    assert [run.name for run in found.runs] == ["z", "a"]  # by seed
    assert found.label == found.family == "adamw"
    write_run(tmp_path / "other", falling_to(3.2), seed=3, data="fedcba9876")
    assert labels(tmp_path) == ["adamw data=01234567", "adamw data=fedcba98"]


def test_labels_say_what_tells_entries_apart_and_no_more(tmp_path: Path) -> None:
    write_run(tmp_path / "1", falling_to(3.0), optimizer="asgo", optimizer__lr=0.01)
    write_run(tmp_path / "2", falling_to(3.1), optimizer="asgo", optimizer__lr=0.0030000000000000001)
    write_run(tmp_path / "3", falling_to(3.2), optimizer="asro")  # its own schedule and settings go without saying
    assert labels(tmp_path) == ["asgo lr=0.01", "asgo lr=0.003", "asro"]
    wide = {"model__d_model": 256, "model__n_heads": 8, "model__d_ff": 1024}  # one of them says it
    write_run(tmp_path / "4", falling_to(3.3), optimizer="asro", **wide)
    write_run(tmp_path / "5", falling_to(3.4), optimizer="asgo", optimizer__lr=0.0100000001, schedule__kind="linear")
    assert labels(tmp_path) == [
        "asgo lr=0.01 schedule.kind=cosine d_model=128",
        "asgo lr=0.003 schedule.kind=cosine d_model=128",
        "asro d_model=128",
        "asro d_model=256",
        "asgo lr=0.0100000001 schedule.kind=linear d_model=128",
    ]
    families = [each.family for each in compare_runs([tmp_path]).entries]
    assert families[0] == families[1] == "asgo schedule.kind=cosine d_model=128"
    assert len(set(families)) == 4


def test_a_key_of_a_table_in_a_table_is_named_with_it(tmp_path: Path) -> None:
    warmup = {"schedule__warmup_fraction": 0.0, "schedule__warmup_steps": 2}
    write_run(tmp_path / "1", falling_to(3.0), optimizer="asgo", **warmup, schedule__momentum__warmup_steps=3)
    write_run(tmp_path / "2", falling_to(3.1), optimizer="asgo", **warmup, schedule__momentum__warmup_steps=4)
    assert labels(tmp_path) == ["asgo momentum.warmup_steps=3", "asgo momentum.warmup_steps=4"]


def test_entries_without_a_final_loss_come_last(tmp_path: Path) -> None:
    write_run(tmp_path / "1", falling_to(4.0), optimizer="muon")
    write_run(tmp_path / "2", {0: 5.0, 80: 1.0}, optimizer="asgo")
    write_run(tmp_path / "3", {}, optimizer="adam")
    write_run(tmp_path / "4", falling_to(2.0), optimizer="adamw")
    assert labels(tmp_path) == ["adamw", "muon", "asgo", "adam"]


def test_the_contender_has_the_most_finished_seeds_then_the_lowest_loss(tmp_path: Path) -> None:
    for lr, losses in {0.1: [2.0], 0.01: [3.2, 3.1], 0.001: [3.0, 3.1]}.items():
        for seed, loss in enumerate(losses):
            write_run(tmp_path / f"asgo-{lr}-s{seed}", falling_to(loss), optimizer="asgo", optimizer__lr=lr, seed=seed)
    write_run(tmp_path / "muon", falling_to(2.5), optimizer="muon")
    comparison = compare_runs([tmp_path])
    assert [each.label for each in comparison.contenders] == ["muon", "asgo lr=0.001"]
    assert [(verdict.first, verdict.second) for verdict in comparison.verdicts] == [("muon", "asgo lr=0.001")]
    assert [each.label for each in comparison.entries] == ["asgo lr=0.1", "muon", "asgo lr=0.001", "asgo lr=0.01"]


def test_the_target_is_reached_at_the_first_validation_at_or_below_it(tmp_path: Path) -> None:
    write_run(tmp_path / "1", {0: 5.0, 40: 3.5, 80: 3.6, 160: 3.2}, seed=1, seconds_a_step=0.25)
    write_run(tmp_path / "2", {0: 5.0, 40: 3.6, 80: 3.4, 160: 3.3}, seed=2, seconds_a_step=0.5)
    write_run(tmp_path / "3", {0: 5.0, 40: 4.5, 160: 4.0}, seed=3)
    comparison = compare_runs([tmp_path], target=3.5)
    assert comparison.target == Target(3.5, "asked for")
    reach = comparison.entries[0].reach
    assert reach == Reach((40, 80, None), (40 * 16 * 128, 80 * 16 * 128, None), (10.0, 40.0, None))
    assert reach.misses == 1


def test_the_target_is_the_final_loss_of_a_reference(tmp_path: Path) -> None:
    write_run(tmp_path / "asgo", falling_to(3.0), optimizer="asgo")
    assert compare_runs([tmp_path]).target is None
    assert compare_runs([tmp_path]).entries[0].reach is None
    write_run(tmp_path / "muon", falling_to(3.5), optimizer="muon")
    assert compare_runs([tmp_path]).target == Target(3.5, "muon's final loss")
    write_run(tmp_path / "adam", falling_to(3.4), optimizer="adam")
    assert compare_runs([tmp_path]).target == Target(3.4, "adam's final loss")
    write_run(tmp_path / "adamw", falling_to(3.2), optimizer="adamw")
    comparison = compare_runs([tmp_path])
    assert comparison.target == Target(3.2, "adamw's final loss")
    assert [each.reach.misses for each in comparison.entries if each.reach] == [0, 0, 1, 1]


def test_bands_are_over_the_steps_that_all_seeds_have(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    losses = [noise.normal(4.0, 0.1, count) for count in (120, 120, 100)]
    vals = [{0: 5.0, 40: 4.0, 80: 3.5, 120: 3.0}, {0: 5.2, 40: 4.3, 80: 3.4, 120: 3.1}, {0: 5.1, 40: 4.1, 80: 3.9}]
    for seed, (val, of_train) in enumerate(zip(vals, losses, strict=True)):
        write_run(tmp_path / str(seed), val, of_train.tolist(), seed=seed, seconds_a_step=seed + 1.0)
    diverged = {0: 5.0, 40: 99.0, 80: 99.0}
    write_run(tmp_path / "diverged", diverged, [99.0] * 90, seed=3)
    write_run(tmp_path / "empty", {}, seed=4)
    (found,) = compare_runs([tmp_path]).entries
    assert (found.diverged, len(found.runs)) == (1, 5)
    assert found.val is not None
    assert found.val.steps.tolist() == [0, 40, 80]
    at = np.array([[val[step] for step in (0, 40, 80)] for val in vals])
    assert found.val.mean == pytest.approx(at.mean(axis=0))
    assert found.val.lowest.tolist() == at.min(axis=0).tolist()
    assert found.val.highest.tolist() == at.max(axis=0).tolist()
    assert found.val.seconds.tolist() == [0, 80, 160]
    assert found.val.tokens.tolist() == [0, 40 * 16 * 128, 80 * 16 * 128]
    assert found.train is not None
    assert found.train.steps.tolist() == list(range(1, 101))
    # A window of 4 % of 160 steps has 3 to each side; the shortest run is at its end there.
    windows = [of_train[47:54].mean() for of_train in losses]
    assert found.train.mean[50] == pytest.approx(np.mean(windows))
    assert (found.train.lowest[50], found.train.highest[50]) == pytest.approx((min(windows), max(windows)))


def test_a_seed_that_has_just_begun_does_not_cut_the_finished_ones_short(tmp_path: Path) -> None:
    write_run(tmp_path / "1", falling_to(3.0), seed=1)
    write_run(tmp_path / "2", {0: 5.0}, seed=2)
    (found,) = compare_runs([tmp_path]).entries
    assert found.val is not None
    assert found.val.steps.tolist() == list(falling_to(3.0))
    assert found.val.mean.tolist() == list(falling_to(3.0).values())


def test_a_last_validation_that_is_no_number_is_a_divergence(tmp_path: Path) -> None:
    write_run(tmp_path / "1", {**falling_to(3.0), 160: float("nan")}, seed=1)
    write_run(tmp_path / "2", falling_to(3.0), seed=2)
    (found,) = compare_runs([tmp_path]).entries
    assert (found.diverged, found.final and found.final.count) == (1, 1)


def test_sensitivities_have_trials_and_final_runs(tmp_path: Path) -> None:
    trials = tmp_path / "trials"

    def run(path: Path, lr: float, val: dict[int, float], seed: int) -> None:
        write_run(path, val, optimizer="asgo", optimizer__lr=lr, seed=seed)

    run(trials / "asgo-t0", 0.001, falling_to(3.5), 1)
    run(trials / "asgo-t1", 0.01, falling_to(3.2), 1)
    run(trials / "asgo-t2", 0.1, {0: 5.0, 160: 9.0}, 1)
    run(trials / "asgo-t3", 0.0001, {0: 5.0, 40: 4.5, 80: 4.6}, 1)
    run(trials / "asgo-t4", 0.5, {}, 1)
    (trials / "search.json").write_text("{}")
    run(tmp_path / "asgo-s2", 0.01, falling_to(3.1), 2)
    write_run(tmp_path / "muon-s2", falling_to(3.4), optimizer="muon")
    comparison = compare_runs([tmp_path])
    assert labels(tmp_path) == ["asgo", "muon"]
    assert [run.name for run in entry(comparison, "asgo").runs] == ["asgo-s2"]
    (found,) = comparison.sensitivities
    assert (found.family, found.optimizer) == ("asgo", "asgo")
    assert found.points == (
        SensitivityPoint(0.0001, (), 0, (4.5,)),
        SensitivityPoint(0.001, (3.5,), 0, ()),
        SensitivityPoint(0.01, (3.2, 3.1), 0, ()),
        SensitivityPoint(0.1, (), 1, ()),
    )


def test_other_settings_that_a_search_tried_stay_out_of_the_labels(tmp_path: Path) -> None:
    for number, beta2 in enumerate((0.8, 0.9, 0.95)):
        path = tmp_path / "trials" / f"asgo-t{number}"
        write_run(path, falling_to(3.0), optimizer="asgo", optimizer__beta2=beta2, optimizer__lr=0.01 * (number + 1))
    (tmp_path / "trials" / "search.json").write_text("{}")
    write_run(tmp_path / "asgo-s1", falling_to(3.0), optimizer="asgo", optimizer__beta2=0.9, optimizer__lr=0.02)
    comparison = compare_runs([tmp_path])
    assert [each.label for each in comparison.entries] == ["asgo"]
    assert [each.family for each in comparison.sensitivities] == []


def test_shorter_trials_at_several_rates_are_families_of_their_own(tmp_path: Path) -> None:
    """Their losses are those of fewer steps, and only the best of the other settings is worth a caution."""
    for decay, losses in {0.1: (3.3, 3.0, 3.2), 1.0: (3.6, 3.5, 3.4)}.items():
        for lr, loss in zip((0.01, 0.02, 0.04), losses, strict=True):
            settings = {"optimizer__lr": lr, "optimizer__weight_decay": decay, "training__steps": 80}
            path = tmp_path / "trials" / f"asgo-t{round(decay * 10)}{round(lr * 100)}"
            write_run(path, {0: 5.0, 80: loss}, optimizer="asgo", **settings)
    (tmp_path / "trials" / "search.json").write_text("{}")
    for name in ("asgo-s1", "trials/superseded/asgo-s1-t0"):
        write_run(tmp_path / name, falling_to(2.5), optimizer="asgo", optimizer__lr=0.02, optimizer__weight_decay=0.1)
    write_run(tmp_path / "adamw-s1", falling_to(2.6), optimizer="adamw")
    comparison = compare_runs([tmp_path])
    assert [each.label for each in comparison.entries] == ["asgo", "adamw"]
    assert [len(each.runs) for each in comparison.entries] == [1, 1], "the superseded run is left out"
    assert sorted((each.family, len(each.points)) for each in comparison.sensitivities) == [
        ("asgo weight_decay=0.1 steps=80", 3),
        ("asgo weight_decay=1 steps=80", 3),
    ]
    assert not [caution for caution in comparison.cautions if "of those tried" in caution]
    assert not [caution for caution in comparison.cautions if "trials" in caution]


def test_runs_of_different_tasks_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "text", falling_to(3.0))
    write_run(tmp_path / "images", falling_to(3.0), task="images")
    with pytest.raises(UsageError, match=r"images trains images, .*text gpt: .* give runs of one task"):
        compare_runs([tmp_path])


@pytest.mark.parametrize("numbers", [{"target": float("nan")}, {"confidence": 1.0}, {"confidence": 0.0}])
def test_numbers_out_of_range_are_refused(tmp_path: Path, numbers: dict[str, float]) -> None:
    write_run(tmp_path / "run", falling_to(3.0))
    with pytest.raises(UsageError, match="must be"):
        compare_runs([tmp_path], **numbers)


def test_what_cannot_change_the_training_makes_no_other_contender(tmp_path: Path) -> None:
    write_run(tmp_path / "1", falling_to(3.0), seed=1, evaluation__every=80, metrics__every=1, checkpoint__every=10)
    write_run(tmp_path / "2", falling_to(3.1), seed=2, evaluation__every=40, metrics__every=3, checkpoint__keep=9)
    assert labels(tmp_path) == ["adamw"]


def test_keys_that_the_schedule_does_not_use_are_not_settings(tmp_path: Path) -> None:
    for name, kind, fraction in (("a", "constant", 0.0), ("b", "constant", 0.1), ("c", "cosine", 0.1)):
        settings: dict[str, Any] = {"schedule__kind": kind, "schedule__final_lr_fraction": fraction}
        write_run(tmp_path / name, falling_to(3.0), seed=ord(name), **settings)
    labels = [entry.label for entry in compare_runs([tmp_path]).entries]
    assert labels == ["adamw schedule.kind=constant", "adamw schedule.kind=cosine"]


def test_labels_prefer_short_values_and_round_long_ones(tmp_path: Path) -> None:
    """As after a search. Four digits do not distinguish the decays, which no label shows: the exponent is rounded."""
    third = -0.3333333333333333
    for name, exponent, lr, decay in (
        ("a", -0.25, 0.00494548066474087, 0.0558286913),
        ("b", third, 0.00258796565, 0.0558297031),
    ):
        settings: dict[str, Any] = {"optimizer__exponent": exponent, "optimizer__weight_decay": decay}
        write_run(tmp_path / name, falling_to(3.0), seed=1, optimizer="shampoo", optimizer__lr=lr, **settings)
    assert labels(tmp_path) == ["shampoo exponent=-0.25", "shampoo exponent=-0.3333"]
    close = (0.004945480665740871, 0.004945480666740871)
    for name, lr in zip("cd", close, strict=True):
        write_run(tmp_path / name, falling_to(3.0), seed=1, optimizer="adamw", optimizer__lr=lr)
    assert {f"adamw lr={lr!r}" for lr in close} <= {*labels(tmp_path)}
