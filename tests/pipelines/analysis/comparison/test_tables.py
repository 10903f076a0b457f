"""The tables and the headline: exact for programs, rounded and honest for people."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from pipelines.analysis.comparison.compare import compare_runs
from pipelines.analysis.comparison.headline import headline
from pipelines.analysis.comparison.report import summary
from pipelines.analysis.comparison.results import Comparison
from pipelines.analysis.comparison.t_tests import holm
from pipelines.analysis.comparison.tables import Record, Table, entry_table, make_tables, median_with_misses
from pipelines.analysis.comparison.verdicts import by_pair
from tests.pipelines.analysis.comparison.run_folders import falling_to, write_run

FINALS = {"muon": (3.0, 3.013, 3.017), "asgo": (3.1, 3.1004, 3.1001), "adamw": (3.11, 3.3, 3.2)}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Three optimizers with three seeds each, and a few other runs of one of them."""
    folder = tmp_path_factory.mktemp("runs")
    for optimizer, finals in FINALS.items():
        for seed, final in enumerate(finals):
            write_run(folder / f"{optimizer}|{seed}", falling_to(final), [4.0] * 160, optimizer=optimizer, seed=seed)
    write_run(folder / "lost", {0: 5.0, 80: 5.5, 160: 6.0}, optimizer="adamw", seed=3)
    write_run(folder / "half", {0: 5.0, 80: 4.0}, optimizer="adamw", optimizer__lr=0.5)
    return compare_runs([folder], target=3.15)


def table_of(comparison: Comparison, name: str) -> Table:
    """The table of that name."""
    return next(table for table in make_tables(comparison) if table.name == name)


def row_of(table: Table, key: str, value: str) -> Record:
    """The record with that value."""
    return next(record for record in table.records if record[key] == value)


def write_all(folder: Path, finals: Mapping[str, Sequence[float]]) -> None:
    """Runs with these final losses."""
    for optimizer, losses in finals.items():
        for seed, final in enumerate(losses):
            write_run(folder / f"{optimizer}{seed}", falling_to(final), optimizer=optimizer, seed=seed)


def ended(folder: Path, finals: dict[str, Sequence[float]]) -> str:
    """The headline of runs with these final losses."""
    write_all(folder, finals)
    return headline(compare_runs([folder]))


def test_csv_figures_read_back_as_the_same_floats(comparison: Comparison) -> None:
    for table in make_tables(comparison):
        read = list(csv.DictReader(io.StringIO(table.csv())))
        assert len(read) == len(table.records)
        for row, record in zip(read, table.records, strict=True):
            for key, value in record.items():
                assert (float(row[key]) if isinstance(value, float) else row[key]) == (
                    value if isinstance(value, float) else "" if value is None else str(value)
                )


def test_an_entry_is_what_its_runs_are(comparison: Comparison) -> None:
    record = row_of(table_of(comparison, "entries"), "optimizer", "muon")
    low, high = scipy.stats.t.interval(0.95, 2, np.mean(FINALS["muon"]), scipy.stats.sem(FINALS["muon"]))
    assert record["final_loss"] == pytest.approx(np.mean(FINALS["muon"]))
    assert (record["final_loss_low"], record["final_loss_high"]) == (pytest.approx(low), pytest.approx(high))
    assert record["best_loss"] == 3.0
    assert (record["steps_to_target"], record["tokens_to_target"], record["missed_target"]) == (160, 160 * 2048, 0)
    assert record["seconds_to_target"] == 80
    assert record["step_ms"] == pytest.approx(np.median(500 + np.arange(1, 161)))
    assert (record["finished"], record["diverged"]) == (3, 0)


def test_a_run_that_missed_the_target_counts_as_never(comparison: Comparison) -> None:
    assert median_with_misses([100, 300, None]) == 300
    assert median_with_misses([100, None]) is None
    table = entry_table(comparison, comparison.contenders)
    (row,) = [row for row in table.texts if row[0].startswith("adamw")]
    cells = dict(zip(table.heads, row, strict=True))
    assert cells["steps to target"] == "3 of 4 missed"
    assert (cells["seeds"], cells["diverged"]) == ("3 of 4", "1")
    assert row_of(table_of(comparison, "entries"), "entry", row[0])["steps_to_target"] is None


def test_every_run_is_listed_with_its_state(comparison: Comparison) -> None:
    runs = table_of(comparison, "runs")
    assert len(runs.records) == 11
    assert row_of(runs, "run", "lost")["state"] == "diverged"
    half = row_of(runs, "run", "half")
    assert (half["state"], half["reason"], half["final_loss"]) == ("unfinished", "at step 80 of 160", None)


def test_names_cannot_break_a_markdown_table(comparison: Comparison) -> None:
    lines = table_of(comparison, "runs").markdown().splitlines()
    bars = [len(line.replace("\\|", "").split("|")) for line in lines]
    assert set(bars) == {bars[0]}
    assert any(line.startswith("| muon\\|0 | muon |") for line in lines)


def test_learning_rates_are_listed_with_what_became_of_them(comparison: Comparison) -> None:
    first, second = table_of(comparison, "sensitivity").records
    assert (first["finished"], first["diverged"], first["final_loss"]) == (
        3,
        1,
        pytest.approx(np.mean(FINALS["adamw"])),
    )
    assert (second["lr"], second["final_loss"], second["best_loss_unfinished"]) == (0.5, None, 4.0)


def test_curves_are_the_validations_of_every_run_with_the_training_loss_there(comparison: Comparison) -> None:
    curves = table_of(comparison, "curves")
    assert curves.texts == ()
    muon = [record for record in curves.records if record["run"] == "muon|1"]
    assert [(record["step"], record["tokens"], record["seconds"]) for record in muon] == [
        (0, 0, 0.0),
        (80, 80 * 2048, 40.0),
        (160, 160 * 2048, 80.0),
    ]
    assert [record["val_loss"] for record in muon] == list(falling_to(FINALS["muon"][1]).values())
    assert [record["train_loss"] for record in muon] == [None, 4.0, 4.0]
    assert {record["run"] for record in curves.records} == {
        record["run"] for record in table_of(comparison, "runs").records
    }


def test_the_final_training_loss_is_the_mean_of_the_last_steps(tmp_path: Path) -> None:
    for seed, end in enumerate((2.0, 2.5)):
        train = [4.0] * 156 + [end, end - 0.1, end + 0.4, end + 0.1]
        write_run(tmp_path / str(seed), falling_to(3.0), train, seed=seed)
    write_run(tmp_path / "going", {0: 5.0, 80: 3.0}, [1.0] * 90, seed=2)
    record = table_of(compare_runs([tmp_path]), "entries").records[0]
    assert record["final_train_loss"] == pytest.approx((2.1 + 2.6) / 2)


def test_a_verdict_can_be_read_from_both_sides(comparison: Comparison) -> None:
    verdicts = by_pair(comparison)
    for verdict in comparison.verdicts:
        turned = verdicts[verdict.second, verdict.first]
        assert verdict.difference is not None
        assert turned.difference is not None
        assert turned.difference.mean == -verdict.difference.mean
        assert (turned.difference.low, turned.difference.high) == (-verdict.difference.high, -verdict.difference.low)
        assert verdict.corrected is not None
        assert turned.corrected == (-verdict.corrected[1], -verdict.corrected[0])
        assert {verdict.outcome, turned.outcome} in ({"better", "worse"}, {"cannot tell"})


def test_the_summary_is_strict_json_even_of_a_run_whose_loss_is_no_number(comparison: Comparison) -> None:
    (entry, *entries) = comparison.entries
    broken = dataclasses.replace(entry, step_ms=float("nan"), optimizer_ms=float("inf"))
    read = json.loads(json.dumps(summary(dataclasses.replace(comparison, entries=(broken, *entries))), allow_nan=False))
    assert read["entries"][0]["step_ms"] is None
    assert [row["run"] for row in read["runs"] if row["state"] == "diverged"] == ["lost"]
    assert read["target"] == {"loss": 3.15, "origin": "asked for"}


def test_the_headline_names_a_winner_only_where_it_is_certain(tmp_path: Path) -> None:
    asgo, adamw = (3.0, 3.001, 3.003), (3.1, 3.102, 3.101)
    test = scipy.stats.ttest_rel(asgo, adamw)  # of the same seeds
    low, high = test.confidence_interval()
    assert ended(tmp_path / "certain", {"asgo": asgo, "adamw": adamw}) == (
        f"asgo wins: it ends at {np.mean(asgo):.4f}, {np.mean(adamw) - np.mean(asgo):.4f} (95% interval {-high:.4f} to "
        f"{-low:.4f}) below adamw, the next, which is certain at 95% (p = {test.pvalue:.2g})."
    )
    close = ended(tmp_path / "close", {"asgo": (3.0, 3.2, 3.1), "adamw": (3.1, 3.0, 3.3)})
    assert close.startswith("asgo ends lowest, at 3.1000, 0.0333 (95% interval -")
    assert close.endswith("whether it is truly better is uncertain.")
    single = ended(tmp_path / "single", {"asgo": (3.0,), "adamw": (3.5,)})
    assert single == (
        "asgo ends lowest, at 3.0000, 0.5000 below adamw, the next; whether it is truly better is uncertain."
    )


def test_the_headline_counts_whom_the_best_is_certainly_better_than(comparison: Comparison, tmp_path: Path) -> None:
    finals: dict[str, Sequence[float]] = {"asgo": (3.0, 3.02), "muon": (3.01, 3.02), "adam": (4.0, 4.021)}
    assert ended(tmp_path, finals).endswith("is uncertain. 1 of 2 others is certainly worse.")
    assert headline(comparison).startswith("muon wins: ")


def test_the_headline_against_one_contender(tmp_path: Path) -> None:
    finals = {"asgo": (3.0, 3.02), "muon": (3.2, 3.3), "adam": (4.0, 4.021), "adamw": (3.1, 3.118)}
    write_all(tmp_path, finals)
    low, high = scipy.stats.ttest_rel(finals["asgo"], finals["adamw"]).confidence_interval()
    p, *_ = holm([scipy.stats.ttest_rel(finals[name], finals["adamw"]).pvalue for name in ("asgo", "muon", "adam")])
    assert headline(compare_runs([tmp_path], against="adamw")) == (
        f"Against adamw, which ends at 3.1090: asgo ends 0.0990 (95% interval {-high:.4f} to {-low:.4f}) below it, "
        f"which is certain at 95% (p = {p:.2g}). Of all 3 others, 1 certainly better, 1 certainly worse."
    )
    only = headline(compare_runs([*tmp_path.glob("asgo?"), *tmp_path.glob("adam?")], against="asgo"))
    assert only.startswith("Against asgo, which ends at 3.0100: adam ends 1.0005 (95% interval 0.9941 to 1.0069) above")
    assert only.endswith(" it, which is certain at 95% (p = 0.00032).")


def test_undecided_pairs_say_how_many_seeds_would_tell(tmp_path: Path) -> None:
    near = {"asgo": (3.0, 3.2, 3.1), "adamw": (3.1, 3.15, 3.3), "muon": (3.102, 3.147, 3.302), "adam": (4.0,)}
    write_all(tmp_path, near)
    table = table_of(compare_runs([tmp_path]), "verdicts")
    assert table.heads[-2:] == ("test", "seeds needed")
    by_pair = {(row[0], row[1]): row[-2:] for row in table.texts}
    differences = np.subtract(near["asgo"], near["adamw"])
    test, needed = by_pair["asgo", "adamw"]
    level = 0.05 / 3  # the smallest p of three pairs
    powers = {
        count: scipy.stats.nct.sf(scipy.stats.t.isf(level / 2, count - 1), count - 1, effect * np.sqrt(count))
        for effect in [abs(np.mean(differences)) / np.std(differences, ddof=1)]
        for count in range(2, 100)
    }
    assert (test, int(needed)) == ("paired", min(count for count, power in powers.items() if power >= 0.8))
    assert by_pair["adamw", "muon"] == ("paired", "more than 100")
    assert by_pair["asgo", "adam"] == ("", "")
    record = next(record for record in table.records if record["seeds_needed"] == "more than 100")
    assert (record["first"], record["test"]) == ("adamw", "paired")
    assert record["corrected_low"] < record["low"] < record["high"] < record["corrected_high"]  # type: ignore[operator]


def test_the_headline_of_what_cannot_be_compared(tmp_path: Path) -> None:
    write_run(tmp_path / "runs/half", {0: 5.0})
    assert headline(compare_runs([tmp_path / "runs"])) == "No run has finished: there is no final loss to compare."
    assert ended(tmp_path / "one", {"asgo": (3.0,)}) == (
        "asgo ends at 3.0000; no other has finished to compare it with."
    )


def test_names_are_no_formulas_of_a_spreadsheet_and_numbers_stay_numbers(tmp_path: Path) -> None:
    write_run(tmp_path / "=1+1", {0: 5.0, 160: -0.5}, seed=1)
    write_run(tmp_path / "plain", {0: 5.0, 160: -0.25}, seed=2)
    rows = list(csv.DictReader(io.StringIO(table_of(compare_runs([tmp_path]), "runs").csv())))
    assert [(row["run"], float(row["final_loss"])) for row in rows] == [("'=1+1", -0.5), ("plain", -0.25)]
