"""Whatever makes runs incomparable is said, with names; and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.analysis.comparison.compare import compare_runs
from tests.pipelines.analysis.comparison.run_folders import falling_to, record_divergence, write_run


def three_seeds(
    folder: Path, optimizer: str, final: float, val: dict[int, float] | None = None, **settings: Any
) -> None:
    """Finished runs with the seeds 1, 2 and 3."""
    for seed in (1, 2, 3):
        losses = falling_to(final + seed / 100, settings.get("training__steps", 160)) if val is None else val
        write_run(folder / f"{optimizer}-s{seed}", losses, optimizer=optimizer, seed=seed, **settings)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder with three good runs of asgo."""
    three_seeds(tmp_path, "asgo", 3.0)
    return tmp_path


def test_a_fair_comparison_has_none(runs: Path) -> None:
    three_seeds(runs, "adamw", 3.1)
    assert compare_runs([runs]).cautions == ()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"data": "fedcba9876"},
            ["Different data: data=01234567 (asgo data=01234567), data=fedcba98 (adamw data=fedcba98); "
             "their losses do not compare."],
        ),
        (
            {"evaluation__batches": 2},
            ["Validated on different amounts of data: 128 samples (asgo evaluation.batches=8), "
             "32 samples (adamw evaluation.batches=2); this changes losses too."],
        ),
        (
            {"evaluation__tokens": 2048},
            ["Validated on different amounts of data: 128 samples (asgo evaluation.batches=8), "
             "the first 2,048 tokens (adamw evaluation.batches=null); this changes losses too."],
        ),
        (
            {"data__order": "sequential"},
            ["Different orders of the data: order=shuffled (asgo order=shuffled), order=sequential "
             "(adamw order=sequential); a difference may be the order's, not the optimizer's."],
        ),
        (
            {"model__d_ff": 256},
            ["Different models: d_ff=512 (asgo d_ff=512), d_ff=256 (adamw d_ff=256); "
             "a difference may be the model's, not the optimizer's."],
        ),
        (
            {"training__steps": 320},
            ["Different amounts of training: 327,680 tokens (asgo steps=160), 655,360 tokens (adamw steps=320); "
             "final losses do not compare, and at equal steps their learning rates have not decayed equally."],
        ),
        (
            {"training__steps": 80, "training__batch_size": 32, "evaluation__batches": 4},
            ["Different batch sizes: batch_size=16 (asgo steps=160), batch_size=32 (adamw steps=80); "
             "equal steps are not equal work."],
        ),
        (
            {"device": "H100"},
            ["Different devices or versions of torch: cpu with torch TORCH (asgo), H100 with torch TORCH (adamw); "
             "times do not compare."],
        ),
    ],
)  # fmt: skip
def test_different_work_is_told(runs: Path, settings: dict[str, Any], expected: list[str]) -> None:
    three_seeds(runs, "adamw", 3.1, **settings)
    comparison = compare_runs([runs])
    torch = comparison.entries[0].runs[0].environment["torch"]
    assert [caution.replace(torch, "TORCH") for caution in comparison.cautions] == expected


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("instructions", "Different instruction sets of the CPU: OLD (asgo), NEW (adamw); losses differ by rounding, "
                         "and times do not compare."),
        ("git_commit", "Different commits of the code: OLD (asgo), NEW (adamw); a difference may be the code's, not "
                       "the optimizer's."),
    ],
)  # fmt: skip
def test_other_machines_and_other_code_are_told(runs: Path, key: str, expected: str) -> None:
    three_seeds(runs, "adamw", 3.1)
    for optimizer, value in (("asgo", "OLD"), ("adamw", "NEW")):
        for config in runs.glob(f"{optimizer}-*/config.json"):
            record = json.loads(config.read_text())
            record["environment"][key] = value
            config.write_text(json.dumps(record))
    assert compare_runs([runs]).cautions == (expected,)
    for config in runs.glob("asgo-*/config.json"):  # as versions before the key wrote it
        record = json.loads(config.read_text())
        del record["environment"][key]
        config.write_text(json.dumps(record))
    assert compare_runs([runs]).cautions == ()


def test_runs_without_a_final_loss_are_told(runs: Path) -> None:
    write_run(runs / "asgo-s4", {0: 5.0, 80: 4.0}, optimizer="asgo", seed=4)
    write_run(runs / "asgo-s5", {0: 5.0, 80: 6.0}, optimizer="asgo", seed=5)
    record_divergence(write_run(runs / "asgo-s6", {0: 5.0}, optimizer="asgo", seed=6), 1, "nan")
    write_run(runs / "asgo-s7", {}, optimizer="asgo", seed=7)
    assert compare_runs([runs]).cautions == (
        "Diverged, so without a final loss: asgo-s5, asgo-s6.",
        "Not finished, so without a final loss: asgo-s4 (at step 80 of 160); their curves are drawn only "
        "if no seed has finished.",
        "Stopped before the learning rate had decayed, which brings losses down: asgo-s4.",
        "Nothing recorded yet: asgo-s7.",
    )


def test_a_constant_learning_rate_has_no_decay_to_wait_for(runs: Path) -> None:
    write_run(runs / "asro-s1", {0: 5.0, 80: 4.0}, optimizer="asro", seed=1)
    assert not any("decayed" in caution for caution in compare_runs([runs]).cautions)


def test_few_and_unequal_seeds_are_told(runs: Path) -> None:
    write_run(runs / "muon", falling_to(3.1), optimizer="muon")
    assert compare_runs([runs]).cautions == (
        "Only one finished seed: muon; a difference may be chance.",
        "Unequal numbers of finished seeds: 3 (asgo), 1 (muon); the means are not equally precise.",
    )


def test_a_seed_that_counts_twice_is_told(runs: Path) -> None:
    write_run(runs / "again", falling_to(3.0), optimizer="asgo", seed=2)
    write_run(runs / "begun", {}, optimizer="asgo", seed=3)  # does not count yet
    assert compare_runs([runs]).cautions == (
        "Nothing recorded yet: begun.",
        "asgo has several runs of seed 2: they are not independent, and its interval is too narrow.",
    )


def test_a_learning_rate_chosen_by_its_own_result_is_told(runs: Path) -> None:
    for lr in (0.003, 0.03):
        three_seeds(runs / str(lr), "asgo", 3.3, optimizer__lr=lr)
    assert compare_runs([runs]).cautions == (
        "asgo lr=0.01 was chosen among 3 learning rates by the same runs that give its final loss, which is "
        "therefore slightly too low.",
    )


@pytest.mark.parametrize(("best", "end"), [(0.001, "lowest"), (0.1, "highest")])
def test_a_best_learning_rate_at_an_end_is_told(runs: Path, best: float, end: str) -> None:
    for number, lr in enumerate((0.001, 0.01, 0.1)):
        final = 2.0 if lr == best else 3.5
        write_run(runs / "trials" / f"asgo-t{number}", falling_to(final), optimizer="asgo", optimizer__lr=lr, seed=9)
    (runs / "trials" / "search.json").write_text("{}")
    assert compare_runs([runs]).cautions == (
        f"asgo: the best learning rate, {best:g}, is the {end} of those tried; the true best may lie beyond.",
    )


def test_a_diverged_neighbour_bounds_the_best_learning_rate(runs: Path) -> None:
    for number, (lr, val) in enumerate({0.001: falling_to(3.5), 0.1: {0: 5.0, 160: 9.0}}.items()):
        write_run(runs / "trials" / f"asgo-t{number}", val, optimizer="asgo", optimizer__lr=lr, seed=9)
    (runs / "trials" / "search.json").write_text("{}")
    assert compare_runs([runs]).cautions == ()


def test_unequal_searches_are_told(runs: Path) -> None:
    three_seeds(runs, "muon", 3.0)
    for place, names in {"x": ("asgo-t0", "muon-t0"), "y": ("asgo-t1",)}.items():
        for name in names:
            optimizer = name.split("-")[0]
            write_run(runs / place / "trials" / name, falling_to(3.0), optimizer=optimizer, seed=9)
        (runs / place / "trials" / "search.json").write_text("{}")
    assert compare_runs([runs]).cautions == (
        "Unequal numbers of trials: 2 (asgo), 1 (muon); contenders with more trials had an advantage.",
    )


def test_trials_alone_are_no_results(tmp_path: Path) -> None:
    for number, lr in enumerate((0.001, 0.01, 0.1)):
        final = 3.0 + abs(number - 1)
        write_run(tmp_path / "trials" / f"asgo-t{number}", falling_to(final), optimizer="asgo", optimizer__lr=lr)
    (tmp_path / "trials" / "search.json").write_text("{}")
    comparison = compare_runs([tmp_path / "trials"])
    assert (comparison.entries, comparison.contenders, comparison.target) == ((), (), None)
    assert len(comparison.sensitivities[0].points) == 3
    assert comparison.cautions == (
        "All runs are trials of a search: they show the effect of learning rates, but are not results.",
    )


def test_many_names_are_cut_short(runs: Path) -> None:
    for seed in range(10, 20):
        write_run(runs / f"asgo-s{seed}", {}, optimizer="asgo", seed=seed)
    (caution,) = compare_runs([runs]).cautions
    assert caution == "Nothing recorded yet: asgo-s10, asgo-s11, asgo-s12, asgo-s13 and 6 more."


def test_many_of_a_kind_are_one_caution(tmp_path: Path) -> None:
    for number in range(8):
        for lr in (0.001, 0.01):
            write_run(
                tmp_path / f"{number}-{lr}", falling_to(3.0 + lr), optimizer__lr=lr, optimizer__weight_decay=number / 8
            )
    chosen = [caution for caution in compare_runs([tmp_path]).cautions if "was chosen among" in caution]
    assert len(chosen) == 1
    assert "and 4 more" in chosen[0]
