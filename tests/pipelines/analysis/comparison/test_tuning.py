"""The best of k trials of a search: exact means over all orders, whose trials count, and what the page says of it."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import tomli_w

from pipelines.analysis.comparison.compare import compare_runs
from pipelines.analysis.comparison.report import check_report_folder, render_page, summary, write_report
from pipelines.analysis.comparison.results import Tuning
from pipelines.analysis.comparison.tuning import RESAMPLES, bootstrap_band, expected_best
from pipelines.analysis.comparison.tuning_figure import draw_tuning
from pipelines.analysis.comparison.tuning_words import tuning_words
from pipelines.analysis.figure_style import figure_style
from pipelines.resolve import assignment_layer
from pipelines.sweeps.contenders import plan_search
from pipelines.sweeps.definition import read_sweep
from pipelines.sweeps.queue import Ending
from pipelines.sweeps.search import open_search, record_search
from pipelines.training.run_folder import RunFolder
from pipelines.training.train import train
from tests.conftest import SMALL, SilentReporter
from tests.pipelines.analysis.comparison.run_folders import falling_to, record_divergence, write_run

STEPS = 80
TOKENS = STEPS * 16 * 128
"""Of a whole trial, which is half as long as a final run."""
DIVERGED = {0: 5.0, 40: 5.5, 80: 6.0}
GOING = {0: 5.0, 40: 2.0}


def write_trials(out: Path, ends: Mapping[str, Sequence[Any]], record: Mapping[str, Any] | str | None = None) -> None:
    """Trials of a random search, or another, with these final losses or validations, by optimizer."""
    for optimizer, values in ends.items():
        for number, end in enumerate(values):
            val = end if isinstance(end, dict) else falling_to(end, STEPS)
            settings: dict[str, Any] = {"optimizer__lr": 0.001 * (number + 1), "training__steps": STEPS, "seed": 9}
            write_run(out / f"trials/{optimizer}-t{number}", val, optimizer=optimizer, **settings)
    write_record(out, record)


def write_record(out: Path, record: Mapping[str, Any] | str | None = None) -> None:
    whole = {"sweep": "my", "sampler": "random", "pruner": "none", "seed": 9, "space": {}}
    text = record if isinstance(record, str) else json.dumps({**whole, **(record or {})})
    (out / "trials/search.json").write_text(text)


def tunings(*paths: Path, **more: Any) -> dict[str, Tuning]:
    """The tunings of a comparison by label."""
    return {each.label: each for each in compare_runs(paths, **more).tunings}


def brute_force(costs: Sequence[float]) -> list[float]:
    """The mean over all orders of the lowest of the first k."""
    orders = np.array(list(itertools.permutations(costs)))
    means: list[float] = np.minimum.accumulate(orders, axis=1).mean(axis=0).tolist()
    return means


@pytest.mark.parametrize("costs", [[3.0], [3.0, 2.0], [1.0, 5.0, 5.0, 2.0], [4.0, 2.5, 9.0, 2.5, 3.0, 1.0, 6.0]])
def test_the_expected_best_is_the_mean_over_all_orders(costs: list[float]) -> None:
    np.testing.assert_allclose(expected_best(np.array(costs)), brute_force(costs), rtol=1e-12)


def test_the_expected_best_of_many_trials_is_that_of_the_binomials() -> None:
    costs = np.sort(np.random.default_rng(1).normal(3.0, 1.0, 999))
    found, ranks = expected_best(costs), np.arange(1, 1000)
    for k in (1, 2, 30, 998, 999):
        chances = scipy.special.binom(999 - ranks, k - 1) / scipy.special.binom(999, k) if k < 100 else None
        if chances is None:  # the binomials are too large for a float: P(the best has a rank above j) is hypergeometric
            above = scipy.stats.hypergeom.pmf(0, 999, np.arange(1000), k)
            chances = -np.diff(above)
        assert found[k - 1] == pytest.approx(chances @ costs, rel=1e-9)
    assert (found[0], found[-1]) == (pytest.approx(costs.mean()), costs[0])


def test_the_band_is_the_percentile_bootstrap() -> None:
    costs = np.random.default_rng(2).normal(3.0, 0.2, 12)
    low, high = bootstrap_band(costs, 0.9)
    for k in (1, 4, 12):
        bootstrap = scipy.stats.bootstrap(
            (costs,), lambda drawn, axis, k=k: expected_best(drawn)[..., k - 1], n_resamples=20_000,
            confidence_level=0.9, method="percentile", rng=1,
        )  # fmt: skip
        expected = bootstrap.confidence_interval
        assert (low[k - 1], high[k - 1]) == (
            pytest.approx(expected.low, abs=0.02),
            pytest.approx(expected.high, abs=0.02),
        )
    np.testing.assert_array_equal(bootstrap_band(costs, 0.9), [low, high])


def test_the_band_covers_the_true_mean_for_few_trials_but_not_for_all_as_the_docs_say() -> None:
    draw = np.random.default_rng(3)

    def trials(*shape: int) -> Any:  # the loss is a parabola in each of two settings
        return 3 + 0.3 * (draw.uniform(-1, 1, (*shape, 2)) ** 2).sum(-1)

    truth = np.minimum.accumulate(trials(20_000, 16), axis=1).mean(axis=0)
    bands = np.array([bootstrap_band(trials(16), 0.95) for _ in range(400)])
    covered = ((bands[:, 0] <= truth) & (truth <= bands[:, 1])).mean(axis=0)
    assert min(covered[:4]) > 0.87
    assert 0.72 < covered[7] < 0.9
    assert 0.45 < covered[15] < 0.7
    assert RESAMPLES == 1000


def test_a_random_search_has_the_mean_over_orders_in_which_a_diverged_trial_counts_as_untrained(tmp_path: Path) -> None:
    write_trials(tmp_path, {"asgo": [3.4, DIVERGED, 3.2, GOING, {}], "muon": [3.3]})
    found = tunings(tmp_path)
    asgo = found["asgo"]
    assert (len(asgo.trials), asgo.counted, asgo.is_expected) == (4, 3, True)
    np.testing.assert_allclose(asgo.best, brute_force([3.4, 5.0, 3.2]))
    np.testing.assert_allclose(asgo.tokens, [TOKENS, 2 * TOKENS, 3 * TOKENS])
    assert asgo.total("tokens") == 3.5 * TOKENS, "the unfinished one has its cost"
    assert asgo.band is not None
    assert asgo.band[:, -1].tolist() == [3.2, 5.0]
    assert found["muon"].best.tolist() == [3.3]


@pytest.mark.parametrize(
    "record", [{"sampler": "grid"}, {"sampler": "tpe"}, "{}", "[", "[" * 100_000, '{"sampler": ["random"]}']
)
def test_where_results_decided_the_order_the_best_is_that_of_the_first(tmp_path: Path, record: Any) -> None:
    write_trials(tmp_path, {"asgo": [*[3.9] * 2, DIVERGED, 3.2, 3.6, *[3.7] * 5, 3.1]}, record)
    (asgo,) = tunings(tmp_path).values()
    assert (asgo.is_expected, asgo.band) == (False, None)
    assert asgo.best.tolist() == [3.9] * 3 + [3.2] * 7 + [3.1], "trial 10 is the last"


def test_with_a_pruner_the_order_matters_and_a_pruned_trial_counts(tmp_path: Path) -> None:
    write_trials(tmp_path, {"asgo": [GOING, 3.5, GOING, 3.4]}, {"pruner": "median"})
    (asgo,) = tunings(tmp_path).values()
    assert not asgo.is_expected
    assert asgo.best.tolist() == [5.0, 3.5, 3.5, 3.4]
    assert asgo.tokens.tolist() == [0.5 * TOKENS, 1.5 * TOKENS, 2 * TOKENS, 3 * TOKENS]


def test_without_a_finished_trial_there_is_nothing_to_say(tmp_path: Path) -> None:
    write_trials(tmp_path, {"asgo": [DIVERGED, GOING, {}]})
    comparison = compare_runs([tmp_path])
    assert comparison.tunings == ()
    assert "tuning" not in summary(comparison)
    assert "Who wins" not in render_page(comparison, {}, [], [])


def test_without_a_validation_of_the_untrained_model_the_worst_trial_stands_for_it(tmp_path: Path) -> None:
    write_trials(tmp_path, {"asgo": [{40: 4.0, 80: 3.5}, {80: 3.2}, {40: 3.0}]})
    record_divergence(RunFolder(tmp_path / "trials/asgo-t2"), 50, "a loss that is not finite")
    np.testing.assert_allclose(tunings(tmp_path)["asgo"].best, brute_force([3.5, 3.2, 3.5]))


def test_accuracies_are_the_highest(tmp_path: Path) -> None:
    for number, end in enumerate((0.5, 0.7, 0.6)):
        val, accuracy = {0: 5.0, 60: 3.0}, {0: 0.1, 60: end}
        write_run(tmp_path / f"trials/asgo-t{number}", val, task="images", accuracy=accuracy, training__steps=60)
    write_record(tmp_path)
    asgo = tunings(tmp_path)["asgo"]
    np.testing.assert_allclose(asgo.best, -np.array(brute_force([-0.5, -0.7, -0.6])))
    assert asgo.band is not None
    assert (asgo.band[0] <= asgo.best).all()
    assert (asgo.best <= asgo.band[1]).all()
    comparison = compare_runs([tmp_path])
    assert summary(comparison)["tuning"][2]["best_accuracy"] == 0.7
    with figure_style():
        figure = draw_tuning(comparison)
    assert figure is not None
    bottom, top = figure.axes[0].get_ylim()
    assert bottom < 0.6 < 0.7 < top


def test_workers_of_one_search_are_put_together_and_two_searches_are_not(tmp_path: Path) -> None:
    write_trials(tmp_path / "whole", {"asgo": [3.4, 3.3, 3.2, 3.5]}, {"sampler": "grid"})
    for worker, numbers in {"w1": (0, 3), "w2": (1, 2)}.items():
        for number in numbers:
            shutil.copytree(tmp_path / f"whole/trials/asgo-t{number}", tmp_path / f"{worker}/trials/asgo-t{number}")
        write_record(tmp_path / worker, {"sampler": "grid"})
    found = tunings(tmp_path / "w1", tmp_path / "w2")
    assert found["asgo"].best.tolist() == [3.4, 3.3, 3.2, 3.2]
    shutil.copytree(tmp_path / "whole", tmp_path / "other")
    assert list(tunings(tmp_path / "other", tmp_path / "whole")) == ["asgo (other)", "asgo (whole)"]
    write_record(tmp_path / "w2", {"sampler": "grid", "seed": 8})
    assert list(tunings(tmp_path / "w1", tmp_path / "w2")) == ["asgo (w1)", "asgo (w2)"]


def test_a_contender_has_the_label_of_its_final_runs_and_their_time_to_the_target(tmp_path: Path) -> None:
    write_trials(tmp_path / "my", {"asgo": [3.4, 3.2], "adamw": [3.3, 3.5], "muon": [3.6, GOING], "adam": [3.7, 3.7]})
    for seed in (1, 2):
        write_run(tmp_path / f"my/asgo-s{seed}", falling_to(3.0), optimizer="asgo", optimizer__lr=0.02, seed=seed)
        write_run(tmp_path / f"my/muon-s{seed}", falling_to(3.4), optimizer="muon", seed=seed)
        write_run(tmp_path / f"my/adamw-s{seed}", falling_to(3.1), optimizer="adamw", seed=seed)
    write_run(tmp_path / "elsewhere/asgo-s1", falling_to(3.3), optimizer="asgo", optimizer__lr=0.5)
    write_run(tmp_path / "elsewhere/adam-s1", falling_to(3.3), optimizer="adam")
    comparison = compare_runs([tmp_path])
    assert [each.label for each in comparison.tunings] == ["asgo lr=0.02", "adamw", "muon", "adam (my)"]
    rows = summary(comparison)["tuning_costs"]
    costs = {row["contender"]: (row["tokens_of_trials"], row["tokens_to_target"], row["tokens"]) for row in rows}
    assert costs == {
        "asgo lr=0.02": (2 * TOKENS, 2 * TOKENS, 4 * TOKENS),
        "adamw": (2 * TOKENS, 2 * TOKENS, 4 * TOKENS),
        "muon": (1.5 * TOKENS, None, None),
    }
    assert rows[0]["seconds"] == 0.5 * 2 * STEPS + 0.5 * 160


def words(folder: Path) -> str:
    return " ".join(tuning_words(compare_runs([folder])))


def test_the_words_name_the_leader_of_each_budget_and_where_bands_overlap(tmp_path: Path) -> None:
    write_trials(tmp_path / "a", {"asgo": [3.9, 3.9, 2.0], "adamw": [3.0, 3.01, 2.99], "adam": [4.5, 4.6]})
    assert words(tmp_path / "a") == (
        "Lowest expected loss: adamw with 1 trial, asgo with 2 trials, as many as all have. "
        "For every number of trials, the leader's band overlaps with another: who leads there is not certain."
    )
    write_trials(tmp_path / "b", {"asgo": [9.0, 4.9, 4.9, 2.0, 4.9], "adamw": [3.0, 3.0, 3.0, 3.0, 3.0]})
    assert words(tmp_path / "b") == (
        "Lowest expected loss: adamw with 1 to 3 trials, asgo with 4 to 5 trials. "
        "With 2 to 5 trials, the leader's band overlaps with another: who leads there is not certain."
    )
    write_trials(tmp_path / "c", {"asgo": [2.0, 2.1], "adamw": [3.0, 3.0]})
    assert words(tmp_path / "c").endswith("asgo with 1 to 2 trials. No band overlaps with that of the leader.")
    write_trials(tmp_path / "d", {"asgo": [3.5, 2.1], "adamw": [3.0, 3.0]}, {"sampler": "grid"})
    assert words(tmp_path / "d") == (
        "Lowest loss so far: adamw with 1 trial, asgo with 2 trials. "
        "These are the results of one order of trials, with one seed each: small differences are chance."
    )


def test_the_table_of_trials_has_the_settings_in_which_they_differ_and_the_results(tmp_path: Path) -> None:
    write_trials(tmp_path, {"asgo": [3.5, 3.25, 4.0]})
    record_divergence(RunFolder(tmp_path / "trials/asgo-t2"), 50, "a loss that is not finite")
    write_run(tmp_path / "asgo-s1", falling_to(3.0), optimizer="asgo")
    write_report(compare_runs([tmp_path]), tmp_path / "report", "asgo compare")
    with (tmp_path / "report/tables/trials.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0].keys() == {"contender", "trial", "seed", "state", "steps", "optimizer.lr", "final_loss"}
    assert [(row["trial"], row["state"], row["optimizer.lr"], row["final_loss"]) for row in rows] == [
        ("trials/asgo-t0", "finished", "0.001", "3.5"),
        ("trials/asgo-t1", "finished", "0.002", "3.25"),
        ("trials/asgo-t2", "diverged", "0.003", ""),
    ]
    assert not (tmp_path / "report/tables/trials.md").exists()


def test_trials_of_different_lengths_have_no_winner(tmp_path: Path) -> None:
    write_trials(tmp_path / "a", {"asgo": [3.5]})
    write_run(tmp_path / "b/trials/adamw-t0", falling_to(3.0), optimizer="adamw")
    write_record(tmp_path / "b")
    assert words(tmp_path).startswith("The trials differ in length, data or kind of search")


def test_the_report_has_figure_tables_and_section(tmp_path: Path) -> None:
    ends = {"asgo": [3.0 + 0.01 * number for number in range(5)], "adamw": [3.1, DIVERGED, 3.2, GOING]}
    write_trials(tmp_path / "runs", ends)
    for optimizer in ends:
        write_run(tmp_path / f"runs/{optimizer}-s1", falling_to(3.0), optimizer=optimizer)
    comparison = compare_runs([tmp_path / "runs"])
    page = write_report(comparison, tmp_path / "report", "asgo compare").read_text(encoding="utf-8")
    for text in ("Who wins at which tuning budget", "bootstrap interval", "one final run until the target, 3.0000"):
        assert text in page
    assert "there is only one order" not in page
    assert {path.name for path in (tmp_path / "report/figures").glob("tuning*")} == {
        "tuning-budget.png",
        "tuning-budget.pdf",
    }
    heads, _, adamw, asgo = (tmp_path / "report/tables/tuning.md").read_text().splitlines()
    assert heads == "|  | trials | diverged | unfinished | best of 1 | best of 2 | best of 4 | best of 5 |"
    assert asgo.startswith("| asgo | 5 |  |  | 3.0200 | 3.0100 | ")
    assert adamw == "| adamw | 4 | 1 | 1 | 3.7667 | 3.1333 |  |  |"
    json.dumps(summary(comparison), allow_nan=False)
    check_report_folder(tmp_path / "report")


def test_a_real_search_has_the_curve_of_its_study(token_folder: Path, tmp_path: Path, reporter: SilentReporter) -> None:
    space = {"optimizer.lr": {"low": 1e-4, "high": 1e-1, "log": True}}
    table = {"trials": 3, "sampler": "random", "space": space, "steps": SMALL["training.steps"] // 2}
    runs = [{"name": "first", "optimizer.name": "asgo"}, {"name": "second", "optimizer.name": "adamw"}]
    document = {"task": "gpt", "preset": "tiny", "seeds": [1], **SMALL, "data.folder": str(token_folder)}
    (tmp_path / "my.toml").write_text(tomli_w.dumps({**document, "runs": runs, "search": table}))
    plan, out = plan_search(read_sweep(str(tmp_path / "my.toml")), assignment_layer([])), tmp_path / "out"
    record_search(plan, out)
    search = open_search(plan, out)
    while (run := search.next()) is not None:
        train(run.run.config, run.folder, reporter)
        search.ended(run, Ending("done", "done"))
    comparison = compare_runs([out])
    found = {each.label: each for each in comparison.tunings}
    assert set(found) == {entry.label for entry in comparison.contenders} == {"asgo", "adamw"}
    for result, label in zip(search.results(), ("asgo", "adamw"), strict=True):
        assert (found[label].counted, found[label].best[-1]) == (3, result.value)
        assert found[label].is_expected
